"""The checkpoint of a loaded model, whose mapped weights are what the file holds now."""

from pathlib import Path

from engine.checkpoints import detect, read_header
from luna_protocol.errors import Broken


class ServedFile:
    """A checkpoint as it is when it is loaded, packed as `family`, or as any for None.

    Raises:
        Broken: it is of another family by now.
    """

    def __init__(self, path: Path, family: str | None):
        found = detect(read_header(path)).family
        if family and found != family:
            raise Broken(
                f"{path.name} was packed as {family}, and is {found} now",
                "pack it again with scripts/add_checkpoint.py",
            )
        self._path = path
        self._loaded = _state_of(path)

    def check_mapped(self) -> None:
        """
        Raises:
            Broken: it was overwritten in place. A file that took its place is another one, and so is none at all.
        """
        now = _state_of(self._path)
        if now and now != self._loaded and now[0] == self._loaded[0]:
            raise Broken(
                f"{self._path.name} was overwritten after it was loaded", "load the model again: scripts/models.py load"
            )

    def check_same(self) -> None:
        """
        Raises:
            Broken: it is not what was loaded, so that its weights cannot come from there again.
        """
        if _state_of(self._path) != self._loaded:
            raise Broken(f"{self._path.name} is not what was loaded", "load the model again: scripts/models.py load")


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns
