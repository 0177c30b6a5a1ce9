"""What a server will map is in the page cache when its workers come to it."""

import ctypes
import mmap
import os
import sys
import threading
from pathlib import Path

import pytest

from serving.read_ahead import read_ahead

MB = 1 << 20


def cached(file: Path) -> float:
    """The share of a file's pages that lie in the page cache."""
    pages = file.stat().st_size // mmap.PAGESIZE
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped,
    ):
        held = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(anchor := ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(start), len(mapped), held) == 0
        del anchor
    return sum(page & 1 for page in held) / pages


def dropped(file: Path) -> Path:
    file.write_bytes(os.urandom(8 * MB))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def settled() -> None:
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what it caches")
def test_files_are_cached_and_one_that_is_gone_stops_none(tmp_path):
    files = [dropped(tmp_path / name) for name in ("a", "b")]
    if cached(files[0]) > 0.5:
        pytest.skip("this file system keeps what it was told to drop")
    read_ahead([files[0], tmp_path / "gone", files[1]])
    settled()
    assert [cached(file) for file in files] == [1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what it caches")
def test_what_would_not_fit_is_left(tmp_path, monkeypatch):
    files = [dropped(tmp_path / name) for name in ("a", "b")]
    if cached(files[0]) > 0.5:
        pytest.skip("this file system keeps what it was told to drop")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 20 * MB}))
    read_ahead(files)
    settled()
    assert cached(files[0]) == 1 and cached(files[1]) < 0.5
