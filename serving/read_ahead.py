"""Reads checkpoints into the system's file cache while the processes that will map them still start."""

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

_PIECE = 4 << 20


def read_ahead(files: Iterable[Path]) -> None:
    """Have the files read in a thread of its own, one after the other: as many as fit into half of the memory that is
    available now, as more would drive out what was read first."""
    room, chosen = psutil.virtual_memory().available // 2, []
    for file in dict.fromkeys(files):
        with suppress(OSError):  # whoever serves it tells of it
            room -= file.stat().st_size
            if room > 0:
                chosen.append(file)
    threading.Thread(target=_read, args=(chosen,), name="read ahead", daemon=True).start()


def _read(files: list[Path]) -> None:
    piece = bytearray(_PIECE)
    for file in files:
        with suppress(OSError), file.open("rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass
