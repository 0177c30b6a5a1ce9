"""One server for one run folder: a second would overwrite the first one's tokens, settings and records."""

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from engine.private_files import make_private_folder, replace_privately


class RunFolder:
    """A folder for the state of a running server, taken from `take` to `release` or to the end of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path / "server.lock", timeout=0, mode=0o600, thread_local=False)
        # A file of its own: Windows lets nobody else read a locked one.
        self._owner = path / "server.pid"

    def take(self) -> None:
        """Make the folder this process's, before anything in it is touched.

        Raises:
            RuntimeError: it is another server's; the message names its process.
        """
        make_private_folder(self._path)
        try:
            self._lock.acquire()
        except Timeout as error:
            owner = "unknown"
            with suppress(OSError):
                owner = self._owner.read_text()
            raise RuntimeError(
                f"a server runs in {self._path} already (process {owner}): stop it, or give this one a --run of its own"
            ) from error
        replace_privately(self._owner, str(os.getpid()))

    def release(self) -> None:
        """Leave the folder to others. Safe to call twice."""
        self._lock.release()
