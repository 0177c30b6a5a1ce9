"""Files that hold prompts and latents, for nobody but their user; on Windows a user's folders are so anyway."""

import os
from contextlib import suppress
from pathlib import Path


def make_private_folder(folder: Path) -> None:
    """Makes `folder` with mode 0700, and its parents. One that is there keeps the mode that somebody gave it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def private(path: str | Path, flags: int) -> int:
    """For `open(..., opener=private)`: the file gets mode 0600, also where it was there already."""
    handle = os.open(path, flags, 0o600)
    make_private(path)
    return handle


def make_private(path: str | Path) -> None:
    """Gives a file mode 0600, where it is this user's."""
    if os.name != "nt":
        with suppress(OSError):
            os.chmod(path, 0o600)


def replace_privately(path: Path, content: str) -> None:
    """Writes `content`, so that readers see the old file or the new one.

    Raises:
        OSError: disk full and the like.
    """
    partial = path.with_name(f"{path.name}.tmp")
    with open(partial, "w", encoding="utf-8", opener=private) as file:
        file.write(content)
    os.replace(partial, path)
