"""How blobs reach the engine and go back: through the client's shared memory, or as bodies."""

import json
import threading
from typing import Any

from torch import Tensor

from engine.role import Reply
from luna_protocol import BLOB, JSON, MAX_BODY_BYTES
from luna_protocol.answer import Answer
from luna_protocol.blob import Blob, unpack
from luna_protocol.errors import LunaError, Malformed, TooLarge
from luna_protocol.messages import Readiness, validate
from luna_protocol.shared_memory import Attachments, SharedBlob


class Transport:
    """The engine's end. Safe to share among threads."""

    def __init__(self):
        self._attachments = Attachments()
        self._lock = threading.Lock()

    def receive(self, body: Any) -> tuple[dict, dict[str, Tensor]]:
        """The message and the tensors of a request; an empty one, as a probe sends, asks whether the model is ready.

        The tensors are views of the body, or of the client's memory.

        Args:
            body: bytes, or JSON's values where TorchServe has parsed them.

        Raises:
            Malformed: neither a blob nor JSON.
            NoSharedMemory: the memory that it names cannot be mapped here.
        """
        if isinstance(body, bytes | bytearray) and not body:
            return Readiness().model_dump(), {}
        if (place := _place(body)) is not None:
            return unpack(self._view(place.request, place.request_bytes))
        if isinstance(body, dict):
            return body, {}
        if isinstance(body, bytes | bytearray):
            return unpack(body)
        raise Malformed(
            "the request is neither a blob nor JSON", "send one with Content-Type octet-stream or application/json"
        )

    def answer(self, body: Any, reply: Blob) -> tuple[str, bytes | bytearray]:
        """Content type and body of the reply: in the client's memory if it offers some and it fits.

        Raises:
            TooLarge: it is more than an HTTP body may be.
        """
        place = _place(body)
        if place is not None and reply.size <= place.reply_bytes:
            reply.write(self._view(place.reply, reply.size))
            return JSON, json.dumps({"shared_memory": reply.size}).encode()
        if reply.size > MAX_BODY_BYTES:  # TorchServe would kill this worker
            raise TooLarge(
                f"the reply has {reply.size} bytes, a body at most {MAX_BODY_BYTES}", "send fewer pictures a request"
            )
        return BLOB, reply.pack()

    def _view(self, name: str, size: int) -> memoryview:
        with self._lock:
            return self._attachments.view(name, size)


def encoded(outcome: Reply | LunaError, body: Any, transport: Transport) -> Answer:
    """The answer to the request `body` that came to `outcome`."""
    if isinstance(outcome, Reply):
        asked_plainly = not body or (isinstance(body, dict) and _place(body) is None)
        try:
            if asked_plainly and not outcome.tensors:
                return Answer(outcome.status, JSON, outcome.message.model_dump_json().encode())
            return Answer(outcome.status, *transport.answer(body, Blob(outcome.message, outcome.tensors)))
        except LunaError as error:
            outcome = error
    return Answer.of_error(outcome)


def _place(body: Any) -> SharedBlob | None:
    if isinstance(body, dict) and "shared_memory" in body:
        return validate(SharedBlob, body["shared_memory"])
    return None
