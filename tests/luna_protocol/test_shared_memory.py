import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luna_protocol import shared_memory
from luna_protocol.errors import NoSharedMemory
from luna_protocol.shared_memory import FOLDER, Attachments, Segment, sweep

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here; HTTP bodies carry the blobs")

ROOT = Path(__file__).resolve().parents[2]
MAKER = (
    "import sys, time; from luna_protocol.shared_memory import Segment; s = Segment(4096); print(s.name, flush=True)"
)


def made_elsewhere(then: str):
    """A process that has made a segment, and its name."""
    process = subprocess.Popen([sys.executable, "-c", f"{MAKER}; {then}"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return process, process.stdout.readline().strip()


def aged(name: str):
    past = time.time() - 3600
    os.utime(FOLDER / name, (past, past))


def test_what_one_writes_the_other_reads():
    segment = Segment(1 << 16)
    segment.buffer[:5] = b"hello"
    view = Attachments().view(segment.name, 5)
    assert bytes(view) == b"hello"
    view[:5] = b"reply"
    assert bytes(segment.buffer[:5]) == b"reply"


def test_only_its_user_may_open_it():
    assert (FOLDER / Segment(10).name).stat().st_mode & 0o777 == 0o600


def test_it_is_gone_after_unlink_collection_and_exit():
    segment = Segment(4096)
    segment.unlink()
    assert not (FOLDER / segment.name).exists()
    segment = Segment(4096)
    name = segment.name
    del segment
    gc.collect()
    assert not (FOLDER / name).exists()
    process, name = made_elsewhere("pass")
    assert process.wait() == 0
    assert not (FOLDER / name).exists()


def test_its_size_is_reserved_when_it_is_made():
    segment = Segment(3 << 20)
    assert (FOLDER / segment.name).stat().st_blocks * 512 >= 3 << 20


def test_no_room_is_an_error_and_leaves_nothing():
    own = f"luna-{os.getpid()}-*"
    before = set(FOLDER.glob(own))
    with pytest.raises(NoSharedMemory, match="no room"):
        Segment(1 << 50)
    assert set(FOLDER.glob(own)) == before


def test_a_system_without_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "none")
    with pytest.raises(NoSharedMemory):
        Segment(10)
    with pytest.raises(NoSharedMemory):
        Attachments().view("luna-1-0123456789abcdef", 10)
    sweep()


def test_attaching_checks_name_and_size():
    attachments, segment = Attachments(), Segment(4096)
    with pytest.raises(NoSharedMemory, match="luna-1-0123456789abcdef"):
        attachments.view("luna-1-0123456789abcdef", 10)
    with pytest.raises(NoSharedMemory, match="4096 bytes, not 4097"):
        attachments.view(segment.name, 4097)
    (FOLDER / "luna-1-fedcba9876543210").symlink_to(FOLDER / segment.name)
    try:
        with pytest.raises(NoSharedMemory):
            attachments.view("luna-1-fedcba9876543210", 10)
    finally:
        (FOLDER / "luna-1-fedcba9876543210").unlink()


def mapped(name: str) -> bool:
    return name in Path("/proc/self/maps").read_text()


def test_what_is_unlinked_is_unmapped_but_not_under_a_view():
    attachments = Attachments()
    kept, dropped, other = Segment(4096), Segment(4096), Segment(4096)
    view = attachments.view(kept.name, 8)
    attachments.view(dropped.name, 8)
    names = kept.name, dropped.name
    for segment in (kept, dropped):
        segment.unlink()
    del kept, dropped, segment
    attachments.view(other.name, 8)
    assert bytes(view) == bytes(8)
    assert (mapped(names[0]), mapped(names[1])) == (True, False)
    del view
    another = Segment(4096)
    attachments.view(another.name, 8)
    assert not mapped(names[0])


def test_the_longest_unused_are_unmapped(monkeypatch):
    monkeypatch.setattr(shared_memory, "_ATTACHED", 3)
    segments = [Segment(4096) for _ in range(5)]
    attachments = Attachments()
    for segment in segments:
        attachments.view(segment.name, 8)
        attachments.view(segments[0].name, 8)
    assert list(attachments._maps) == [segments[3].name, segments[4].name, segments[0].name]


def test_sweeping_removes_what_the_dead_left_and_nothing_else():
    living, of_living = made_elsewhere("time.sleep(60)")
    dead, of_dead = made_elsewhere("time.sleep(60)")
    fresh, of_fresh = made_elsewhere("time.sleep(60)")
    own = Segment(4096)
    foreign = FOLDER / "luna-notes"
    foreign.touch()
    try:
        for process in (dead, fresh):
            process.kill()
            process.wait()
        for name in (own.name, of_living, of_dead, foreign.name):
            aged(name)
        sweep()
        there = {path.name for path in FOLDER.glob("luna-*")}
        assert {own.name, of_living, of_fresh, foreign.name} <= there
        assert of_dead not in there
    finally:
        living.kill()
        living.wait()
        for name in (of_living, of_dead, of_fresh, foreign.name):
            (FOLDER / name).unlink(missing_ok=True)


def test_a_killed_worker_takes_nothing_with_it():
    """What it had attached to stays: its maker still uses it."""
    segment = Segment(4096)
    view = f"Attachments().view({segment.name!r}, 9)"
    code = f"from luna_protocol.shared_memory import Attachments; v = {view}; v[:2] = b'ok'"
    subprocess.run([sys.executable, "-c", code + "; import os; os.kill(os.getpid(), 9)"], cwd=ROOT)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert bytes(segment.buffer[:2]) == b"ok"
    assert (FOLDER / segment.name).exists()
