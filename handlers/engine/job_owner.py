"""Who works on a job, and whether it still lives: each owner holds a lock file that the kernel frees when it dies.

Safer than process ids, which are used again and differ between containers.
"""

import secrets
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout


class Owner:
    """This process among those that share the folder `folder`, for as long as it lives or until `release`."""

    def __init__(self, folder: Path):
        self.id = secrets.token_hex(8)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock_of(self.id)
        self._lock.acquire()

    def is_dead(self, owner: str) -> bool:
        """True when `owner` has died on this machine; one of another machine is not seen, its lease has to expire."""
        if owner == self.id or not self._path(owner).exists():
            return False
        try:
            with self._lock_of(owner).acquire(timeout=0):
                return True
        except Timeout:
            return False

    def forget(self, owner: str) -> None:
        """Removes the lock file of a dead owner that has no jobs left."""
        with suppress(OSError):
            self._path(owner).unlink()

    def others(self) -> list[str]:
        return [path.stem for path in self._folder.glob("*.lock") if path.stem != self.id]

    def release(self) -> None:
        self._lock.release()
        self.forget(self.id)

    def _path(self, owner: str) -> Path:
        return self._folder / f"{owner}.lock"

    def _lock_of(self, owner: str) -> FileLock:
        return FileLock(self._path(owner), thread_local=False)
