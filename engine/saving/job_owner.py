"""Who works on a job, and whether it still lives: each owner holds a lock file that the kernel frees when it dies.

Safer than process ids, which are used again and differ between containers.
"""

import hashlib
import secrets
from collections import Counter
from collections.abc import Set
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from engine.private_files import make_private_folder

_KEY = 8  # characters


class Owner:
    """This worker of `model` among those that share the folder `folder`, for as long as its process lives or until
    `release`."""

    def __init__(self, folder: Path, model: str):
        self.id = model_key(model) + secrets.token_hex(4)
        self._folder = folder
        make_private_folder(folder)
        self._lock = _lock(folder / f"{self.id}.lock")
        self._lock.acquire()

    def dead(self) -> set[str]:
        """Owners that have died on this machine. Of another machine's nothing is seen: their leases have to end."""
        others = [path for path in self._folder.glob("*.lock") if path.stem != self.id]
        return {path.stem for path in others if not _is_held(path)}

    def forget(self, owners: Set[str]) -> None:
        """Removes the lock files of dead owners that hold nothing any more."""
        for owner in owners:
            _remove(self._folder / f"{owner}.lock")

    def release(self) -> None:
        self._lock.release()
        _remove(self._folder / f"{self.id}.lock")


def living(folder: Path) -> Counter[str]:
    """How many workers share the folder just now, by `model_key`."""
    return Counter(path.stem[:_KEY] for path in folder.glob("*.lock") if _is_held(path))


def model_key(model: str) -> str:
    """What the ids of a model's owners begin with."""
    return hashlib.blake2b(model.encode()).hexdigest()[:_KEY]


def _is_held(path: Path) -> bool:
    try:
        with _lock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock(path: Path) -> FileLock:
    # Any thread of the process may release it; and each probe is an object of its own, so that it really asks.
    return FileLock(path, mode=0o600, thread_local=False)


def _remove(path: Path) -> None:
    # On Windows a file that somebody probes just now stays until the next time.
    with suppress(OSError):
        path.unlink()
