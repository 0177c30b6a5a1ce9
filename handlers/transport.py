"""How blobs reach a worker and go back: through the client's shared memory, or as HTTP bodies."""

import json
from typing import Any

from torch import Tensor

from luna_protocol import BLOB, JSON, MAX_BODY_BYTES
from luna_protocol.blob import Blob, unpack
from luna_protocol.errors import Malformed, TooLarge
from luna_protocol.messages import Readiness, validate
from luna_protocol.shared_memory import Attachments, SharedBlob


class Transport:
    """The worker's end."""

    def __init__(self):
        self._attachments = Attachments()

    def receive(self, row: dict[str, Any]) -> tuple[dict, dict[str, Tensor]]:
        """The message and the tensors of one of TorchServe's rows; one without a body, as a probe sends, asks whether
        the model is ready.

        The tensors are views of the body, or of the client's memory.

        Raises:
            Malformed: neither a blob nor JSON.
            NoSharedMemory: the memory that it names cannot be mapped here.
        """
        body = _body(row)
        if isinstance(body, bytes | bytearray) and not body:
            return Readiness().model_dump(), {}
        if (place := _place(body)) is not None:
            return unpack(self._attachments.view(place.request, place.request_bytes))
        if isinstance(body, dict):
            return body, {}
        if isinstance(body, bytes | bytearray):
            return unpack(body)
        raise Malformed(
            "the request is neither a blob nor JSON", "send one with Content-Type octet-stream or application/json"
        )

    def answer(self, row: dict[str, Any], reply: Blob) -> tuple[str, bytes | bytearray]:
        """Content type and body of the reply: in the client's memory if it offers some and it fits.

        Raises:
            TooLarge: it is more than an HTTP body may be.
        """
        place = _place(_body(row))
        if place is not None and reply.size <= place.reply_bytes:
            reply.write(self._attachments.view(place.reply, reply.size))
            return JSON, json.dumps({"shared_memory": reply.size}).encode()
        if reply.size > MAX_BODY_BYTES:  # TorchServe would kill this worker
            raise TooLarge(
                f"the reply has {reply.size} bytes, a body at most {MAX_BODY_BYTES}", "send fewer pictures a request"
            )
        return BLOB, reply.pack()


def is_plain_json(row: dict[str, Any]) -> bool:
    """Whether the request is the message itself, from a caller that expects the same of a reply without tensors."""
    body = _body(row)
    return not body or (isinstance(body, dict) and _place(body) is None)


def _body(row: dict[str, Any]) -> Any:
    return row["body"] if "body" in row else row.get("data") or b""


def _place(body: Any) -> SharedBlob | None:
    if isinstance(body, dict) and "shared_memory" in body:
        return validate(SharedBlob, body["shared_memory"])
    return None
