"""Models that are about to give way to a new archive, marked by a file each: who comes meanwhile has to try again."""

import time
from pathlib import Path

from engine.private_files import make_private_folder
from luna_protocol.model_names import archive_name

_WITHIN = 180.0  # seconds


def mark_replaced(run: Path, model: str, replaced: bool) -> None:
    """Have the engines refuse what comes for a model of the store, until told otherwise or for three minutes."""
    mark = _mark(run, model)
    if replaced:
        make_private_folder(mark.parent)
        mark.touch(0o600)
    else:
        mark.unlink(missing_ok=True)


def is_replaced(run: Path, model: str) -> bool:
    """Whether the model is marked so, and not for too long."""
    try:
        return time.time() - _mark(run, model).stat().st_mtime < _WITHIN
    except OSError:
        return False


def _mark(run: Path, model: str) -> Path:
    return run / "replaced" / archive_name(model)
