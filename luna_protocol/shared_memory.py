"""Memory that a client and a worker on one machine both map, so that blobs pass between them without being sent.

Not `multiprocessing.shared_memory`: before Python 3.13 its tracker unlinks, when a worker ends, what the worker only
attached to; it reserves nothing, so that a full /dev/shm kills the process that writes to it; and it cannot tell what a
dead process has left from what a live one uses. Here a segment is a file in /dev/shm, reserved when it is made, and
locked by its maker for as long as the maker lives. So Linux only: elsewhere the HTTP body carries the blob.
"""

import mmap
import os
import re
import secrets
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from luna_protocol.errors import NoSharedMemory
from luna_protocol.pinned import pin

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER = Path("/dev/shm")
MAX_BYTES = 1 << 32
_NAME = re.compile(r"luna-\d+-[0-9a-f]{16}")
_ATTACHED = 256
_SETTLED_SECONDS = 60


class SharedBlob(BaseModel):
    """What a request's HTTP body says in place of the blob: {"shared_memory": {...}}.

    request, request_bytes: the segment whose first bytes are the request's blob, and how many.
    reply, reply_bytes: the segment that the reply's blob may be written to, and how many it takes.
    """

    model_config = ConfigDict(extra="forbid")

    request: str = Field(pattern=f"^{_NAME.pattern}$")
    request_bytes: int = Field(ge=8, le=MAX_BYTES)
    reply: str = Field(pattern=f"^{_NAME.pattern}$")
    reply_bytes: int = Field(ge=0, le=MAX_BYTES)


class Segment:
    """Memory of one's own making, which processes of the same user can map too. Its name is taken away by `unlink`, or
    when it is collected, or when this process ends; the memory goes when nobody maps it any longer.

    Raises:
        NoSharedMemory: this system has none, or not as much as this.
    """

    def __init__(self, size: int):
        self.name = f"luna-{os.getpid()}-{secrets.token_hex(8)}"
        self.size = size
        memory = _create(FOLDER / self.name, size)
        self.buffer = memoryview(memory)
        self.unlink = weakref.finalize(self, (FOLDER / self.name).unlink, missing_ok=True)
        weakref.finalize(self, pin(memory))


class Attachments:
    """Segments of others, kept mapped: the same one comes back with a sampler's every step.

    Not thread-safe: whoever shares it among threads takes a lock.
    """

    def __init__(self):
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._unpin: dict[str, Callable[[], object]] = {}

    def view(self, name: str, size: int) -> memoryview:
        """The first `size` bytes of a segment.

        Raises:
            NoSharedMemory: there is no such segment here, it is smaller, or another user's.
        """
        if name not in self._maps:
            self._forget()
            self._maps[name] = _attach(FOLDER / name)
            self._unpin[name] = pin(self._maps[name])
        self._maps.move_to_end(name)
        attached = self._maps[name]
        if len(attached) < size:
            raise NoSharedMemory(f"the segment {name} has {len(attached)} bytes, not {size}")
        return memoryview(attached)[:size]

    def _forget(self) -> None:
        """Unmaps what its maker has unlinked, and the longest unused. What a tensor still views stays until later."""
        surplus = len(self._maps) - _ATTACHED
        for index, (name, attached) in enumerate(list(self._maps.items())):
            if index <= surplus or not (FOLDER / name).exists():
                with suppress(BufferError):
                    if unpin := self._unpin.pop(name, None):
                        unpin()
                    attached.close()
                    del self._maps[name]


def sweep() -> None:
    """Removes the segments of processes that have died."""
    for path in FOLDER.glob("luna-*") if fcntl else ():
        with suppress(OSError):
            # What was made a moment ago may not be locked yet.
            if _NAME.fullmatch(path.name) and time.time() - path.stat().st_mtime > _SETTLED_SECONDS:
                file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the maker lives
                    path.unlink()
                finally:
                    os.close(file)


def _create(path: Path, size: int) -> mmap.mmap:
    if fcntl is None or not FOLDER.is_dir():
        raise NoSharedMemory(f"this system has no {FOLDER}")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.posix_fallocate(file, 0, size)
            return mmap.mmap(file, size)  # which holds a duplicate of `file`, and with it the lock
        finally:
            os.close(file)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise NoSharedMemory(f"{FOLDER} has no room for {size} bytes: {error.strerror}") from error


def _attach(path: Path) -> mmap.mmap:
    if fcntl is None:
        raise NoSharedMemory("this server's system has no shared memory of this kind")
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            return mmap.mmap(file, 0)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise NoSharedMemory(f"the segment {path.name} cannot be mapped here: {error}") from error
