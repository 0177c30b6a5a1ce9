"""What is on disk when, and what a repetition after a crash makes of it."""

import errno
import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest
from sqlalchemy import event

from engine.saving import durable_files
from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.durable_files import put_in_place, write_part
from engine.saving.picture_records import PictureRecords
from tests.engine.saving.save_jobs import a_job, decode, latents, wait_for

CONTENT = b"a picture"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def without_links(*_arguments, **_options):
    raise OSError(errno.EPERM, "no hard links here")


@pytest.fixture(params=["links", "no links"])
def paths(request, tmp_path, monkeypatch) -> tuple[Path, Path]:
    if request.param == "no links":
        monkeypatch.setattr(os, "link", without_links)
    return tmp_path / ".x.part", tmp_path / "x.png"


def test_a_part_gets_its_name_however_often(paths):
    part, final = paths
    assert write_part(part, CONTENT) == SHA256
    for _ in range(3):
        put_in_place(part, final, SHA256)
        assert final.read_bytes() == CONTENT and not part.exists()


def test_killed_between_the_two_names_it_goes_on(tmp_path):
    part, final = tmp_path / ".x.part", tmp_path / "x.png"
    write_part(part, CONTENT)
    os.link(part, final)
    put_in_place(part, final, SHA256)
    assert final.read_bytes() == CONTENT and not part.exists()


def test_another_file_of_the_name_stays(paths):
    part, final = paths
    write_part(part, CONTENT)
    final.write_bytes(b"somebody else's")
    with pytest.raises(FileExistsError):
        put_in_place(part, final, SHA256)
    assert final.read_bytes() == b"somebody else's" and part.read_bytes() == CONTENT
    part.unlink()
    with pytest.raises(FileNotFoundError):
        put_in_place(part, final, SHA256)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_part(tmp_path / "x.part", CONTENT)
    assert list(tmp_path.iterdir()) == []


def unsynced(folder_error: int | None, file_error: int | None):
    """An `os.fsync` that fails so for folders and for files."""

    def fsync(handle: int) -> None:
        code = folder_error if stat.S_ISDIR(os.fstat(handle).st_mode) else file_error
        if code is not None:
            raise OSError(code, os.strerror(code))

    return fsync


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot and need not sync folders")
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.ENOTSUP], ids=errno.errorcode.get)
def test_a_share_that_cannot_sync_folders_takes_pictures_and_is_logged_once(tmp_path, monkeypatch, caplog, code):
    monkeypatch.setattr(os, "fsync", unsynced(folder_error=code, file_error=None))
    monkeypatch.setattr(durable_files, "_without_sync", set())
    for name in ("a", "b"):
        write_part(tmp_path / name / ".x.part", CONTENT)
        put_in_place(tmp_path / name / ".x.part", tmp_path / name / "x.png", SHA256)
        assert (tmp_path / name / "x.png").read_bytes() == CONTENT
    assert len(caplog.records) == 1 and "does not sync folders" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot and need not sync folders")
def test_other_failures_of_a_folders_sync_and_all_of_a_files_are_failures(tmp_path, monkeypatch):
    for errors in ({"folder_error": errno.ENOSPC, "file_error": None}, {"folder_error": None, "file_error": errno.EIO}):
        monkeypatch.setattr(os, "fsync", unsynced(**errors))
        with pytest.raises(OSError):
            write_part(tmp_path / ".x.part", CONTENT)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot and need not sync folders")
def test_everything_is_on_disk_before_the_step_that_relies_on_it(tmp_path, monkeypatch):
    """A power cut takes what was not synced: a file, its name, and only then the row that says so."""
    events: list[str] = []
    fsync, link, unlink, sync_folder = os.fsync, os.link, Path.unlink, durable_files.sync_folder

    def told(name, call):
        def calling(*arguments, **options):
            result = call(*arguments, **options)
            events.append(name)
            return result

        return calling

    monkeypatch.setattr(os, "link", told("name", link))
    monkeypatch.setattr(durable_files, "sync_folder", told("folder synced", sync_folder))
    monkeypatch.setattr(durable_files.os, "fsync", told("synced", fsync))
    monkeypatch.setattr(Path, "unlink", told("part gone", unlink))
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "output")
    records = PictureRecords(f"sqlite:///{tmp_path / 'p.sqlite3'}")
    queue.submit(job := a_job("png", save_mode="database_store"), latents(job))
    tending = lambda: threading.current_thread().name == "tend"  # noqa: E731  (it forgets old jobs meanwhile)
    event.listen(queue.engine, "commit", lambda _: tending() or events.append("queue commits"))
    event.listen(records.engine, "commit", lambda _: events.append("records commit"))
    worker = DecodeWorker(queue, decode, records=records)
    worker.start()
    wait_for(queue, job)
    worker.stop()
    relevant = [name for name in events if name != "synced"]
    first = relevant.index("folder synced")
    assert events[events.index("folder synced") - 2 : events.index("folder synced")] == ["synced", "synced"]
    assert relevant[first : first + 7] == [
        "folder synced",  # the part's name
        "queue commits",  # staged
        "name",
        "folder synced",
        "part gone",
        "records commit",
        "queue commits",  # done
    ]
    with queue.engine.connect() as db:
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    queue.close()
    records.close()
