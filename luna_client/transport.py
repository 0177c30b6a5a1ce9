"""How blobs reach a server: through shared memory where it runs on this machine, else as HTTP bodies."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from luna_client.addresses import is_loopback
from luna_client.connections import Answer, Body
from luna_protocol import BLOB, JSON
from luna_protocol.blob import Blob, unpack
from luna_protocol.errors import Internal, NoSharedMemory
from luna_protocol.shared_memory import Segment, SharedBlob, sweep

log = logging.getLogger(__name__)

_SMALLEST = 1 << 20
_IDLE = 4


class Transport:
    """Safe to share among threads.

    Shared memory is tried where `address` is a loopback one, until a worker says that it cannot map ours: it may be in
    a container, or at the far end of a tunnel. From then on, the bodies carry everything.
    """

    def __init__(self, address: str):
        self._address = address
        self._leases = _Leases() if is_loopback(address) else None

    @property
    def shares_memory(self) -> bool:
        """Whether calls go through shared memory, as far as is known; else `MAX_BODY_BYTES` bounds each of them."""
        return self._leases is not None

    def ask(self, blob: Blob, send: Callable[[Body], Answer]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The reply that `send` brings to a blob: its message, and its tensors in memory of their own."""
        if leases := self._leases:
            with leases.one(blob) as lease:
                try:
                    if lease:
                        return lease.read(send(Body(JSON, blob.size, lease.body)))
                except NoSharedMemory as error:
                    self._leases = None
                    log.warning("%s cannot map our memory, so HTTP carries all tensors: %s", self._address, str(error))
        return _unpacked(send(Body(BLOB, blob.size, blob.pack)))


class _Lease:
    """The two segments of one call."""

    def __init__(self):
        self._request, self._reply = Segment(_SMALLEST), Segment(_SMALLEST)
        self._reply_wanted = 0
        self._blob_bytes = 0
        self._sent = 0

    @property
    def is_clean(self) -> bool:
        """Whether no worker can write to it any longer: a call that was sent twice may still be answered once more."""
        return self._sent == 1

    def write(self, blob: Blob) -> None:
        """Puts the request where the worker will find it."""
        self._request = _with_room(self._request, blob.size)
        with suppress(NoSharedMemory):  # a reply that does not fit comes as a body
            self._reply = _with_room(self._reply, self._reply_wanted)
        blob.write(self._request.buffer)
        self._blob_bytes = blob.size
        self._sent = 0

    def body(self) -> bytes:
        self._sent += 1
        place = SharedBlob(
            request=self._request.name,
            request_bytes=self._blob_bytes,
            reply=self._reply.name,
            reply_bytes=self._reply.size,
        )
        return json.dumps({"shared_memory": place.model_dump()}).encode()

    def read(self, answer: Answer) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if answer.content_type != JSON:
            self._reply_wanted = len(answer.body)
            return _unpacked(answer)
        try:
            size = int(json.loads(answer.body)["shared_memory"])
        except (ValueError, KeyError, TypeError) as error:
            raise Internal(f"the worker answers {answer.body[:200]!r}", "is it of another version?") from error
        return unpack(self._reply.buffer[:size].toreadonly())  # copied, as the next reply comes there too

    def unlink(self) -> None:
        self._request.unlink()
        self._reply.unlink()


def _unpacked(answer: Answer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if answer.content_type != BLOB:
        told = f"{answer.content_type or 'something'}: {bytes(answer.body[:200])!r}"
        raise Internal(f"the server answers {told}", "is it a LunaServe, and of this version?")
    return unpack(answer.body)


class _Leases:
    def __init__(self):
        sweep()
        self._idle: list[_Lease] = []
        self._lock = threading.Lock()

    @contextmanager
    def one(self, blob: Blob) -> Iterator[_Lease | None]:
        """A lease that holds `blob`, the one used last if there is one, as its memory is in the caches; None for want
        of room."""
        with self._lock:
            lease = self._idle.pop() if self._idle else None
        clean = False
        try:
            try:
                lease = lease or _Lease()
                lease.write(blob)
            except NoSharedMemory as error:
                log.warning("HTTP carries the tensors of this call: %s", str(error))
                yield None
            else:
                yield lease
                clean = lease.is_clean
        finally:
            with self._lock:
                kept = clean and len(self._idle) < _IDLE
                if kept:
                    self._idle.append(lease)
            if lease and not kept:
                lease.unlink()


def _with_room(segment: Segment, size: int) -> Segment:
    """`segment`, or in its place one with a quarter more room than `size`, as the next call may be a little larger."""
    if size <= segment.size:
        return segment
    larger = Segment((size + size // 4 + _SMALLEST - 1) // _SMALLEST * _SMALLEST)
    segment.unlink()
    return larger
