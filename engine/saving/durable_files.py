"""Files that are complete under their final name or not there at all, whatever is killed or unplugged in between."""

import errno
import hashlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

# How SMB, FUSE and WSL say that their folders cannot be synced. A disk that fails fails at the file's own sync too.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EIO, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
_without_sync: set[int] = set()  # numbers of devices


def write_part(part: Path, content: bytes | memoryview) -> str:
    """Writes `content` to the temporary file `part` and waits until the disk holds it; its SHA-256.

    Raises:
        OSError: disk full and the like; nothing is left behind.
    """
    make_folder(part.parent)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_folder(part.parent)
    return hashlib.sha256(content).hexdigest()


def put_in_place(part: Path, final: Path, sha256: str) -> None:
    """Gives the complete file `part`, of that hash, its final name; may be repeated after a crash at any point.

    Raises:
        FileExistsError: `final` is another file; it is not touched.
        FileNotFoundError: neither is there.
    """
    if not part.exists():
        if holds(final, sha256):
            return
        raise FileNotFoundError(errno.ENOENT, f"neither {part} nor {final} holds what was written")
    try:
        os.link(part, final)
    except FileExistsError:
        if not part.samefile(final):
            raise
    except OSError:
        # A file system without hard links (FAT, some network shares). Windows' rename refuses to overwrite; elsewhere
        # another program has microseconds to take the name.
        if final.exists():
            raise FileExistsError(f"{final} is there already") from None
        part.rename(final)
    sync_folder(final.parent)
    part.unlink(missing_ok=True)


def holds(path: Path, sha256: str) -> bool:
    """Whether there is a file of that hash."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def make_folder(folder: Path) -> None:
    """Makes `folder` and its parents, each entry on disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the disk holds `folder`'s entries. Windows cannot and need not: NTFS logs them. A file system that
    does not offer it may forget a file's name when the power fails, which the log says once."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
        device = os.fstat(handle).st_dev
        if device not in _without_sync:
            _without_sync.add(device)
            log.warning("the file system of %s does not sync folders: %s", folder, error)
    finally:
        os.close(handle)
