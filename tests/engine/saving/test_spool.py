"""What lies in the spool folder: for nobody but its user, and readable by the next LunaServe."""

import json
import os
import stat
from pathlib import Path

import pytest
from sqlalchemy import create_engine, delete, insert, select, update

from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.job_tables import PAYLOADS, VERSION, VERSIONS
from engine.saving.picture_records import PictureRecords
from luna_protocol.blob import METADATA_KEY
from luna_protocol.errors import Broken
from luna_protocol.save_job import QueueStatus
from tests.engine.saving.save_jobs import a_job, check_complete, decode, latents, wait_for


def work(home: Path, *jobs) -> DecodeQueue:
    """Has the queue of `home` done; the worker has ended, the database is still open."""
    queue = DecodeQueue(home / "spool", home / "output")
    worker = DecodeWorker(queue, decode, records=PictureRecords(f"sqlite:///{home / 'spool' / 'pictures.sqlite3'}"))
    worker.start()
    for job in jobs:
        check_complete(home / "output", wait_for(queue, job))
    worker.stop()
    return queue


def modes(folder: Path) -> dict[str, str]:
    paths = [folder, *folder.rglob("*")]
    return {path.relative_to(folder).as_posix(): stat.filemode(path.stat().st_mode) for path in paths}


@pytest.mark.skipif(os.name == "nt", reason="on Windows a user's folders are private by themselves")
def test_other_users_can_read_neither_jobs_nor_records(tmp_path):
    os.umask(previous := os.umask(0))
    try:
        os.umask(0)
        queue = DecodeQueue(tmp_path / "spool", tmp_path / "output")
        queue.submit(job := a_job(save_mode="database_store"), latents(job))
        records = PictureRecords(f"sqlite:///{tmp_path / 'spool' / 'pictures.sqlite3'}")
        worker = DecodeWorker(queue, decode, records=records)
        worker.start()
        wait_for(queue, job)
        found = modes(tmp_path / "spool")
        worker.stop()
    finally:
        os.umask(previous)
    assert {"jobs.sqlite3", "jobs.sqlite3-wal", "jobs.sqlite3-shm", "pictures.sqlite3", "owners"} <= found.keys()
    assert {name for name in found if name.endswith(".lock")}
    assert all(mode in ("drwx------", "-rw-------") for mode in found.values()), found


@pytest.mark.skipif(os.name == "nt", reason="on Windows a user's folders are private by themselves")
def test_files_that_an_older_version_left_readable_are_closed(tmp_path):
    work(tmp_path, *[]).close()
    for path in (tmp_path / "spool").glob("*.sqlite3*"):
        path.chmod(0o644)
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "output")
    queue.submit(job := a_job(), latents(job))
    found = {name: mode for name, mode in modes(tmp_path / "spool").items() if "sqlite3" in name}
    assert len(found) >= 3 and set(found.values()) == {"-rw-------"}, found


def test_jobs_of_before_an_upgrade_are_done(tmp_path):
    """A field that is gone by now must not cost the picture, nor a spool of before there were versions its jobs."""
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "output")
    queue.submit(job := a_job("png", "webp"), latents(job))
    with queue.engine.begin() as db:
        db.execute(delete(VERSIONS))
        blob = with_fields_of_an_older_version(db.scalar(select(PAYLOADS.c.blob)))
        db.execute(update(PAYLOADS).values(blob=blob))
    queue.close()
    queue = work(tmp_path, job)
    with queue.engine.connect() as db:
        assert db.scalars(select(VERSIONS.c.version)).all() == [VERSION]


def with_fields_of_an_older_version(blob: bytes) -> bytes:
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    told = json.loads(header["__metadata__"][METADATA_KEY])
    told["message"] |= {"a_field_of_once": 7}
    told["message"]["groups"][0] |= {"another": "x"}
    header["__metadata__"][METADATA_KEY] = json.dumps(told)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + blob[8 + size :]


def test_a_spool_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path):
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "output")
    queue.submit(job := a_job(), latents(job))
    queue.close()
    database = f"sqlite:///{tmp_path / 'spool' / 'jobs.sqlite3'}"
    with create_engine(database).begin() as db:
        db.execute(insert(VERSIONS).values(version=VERSION + 1))
    with pytest.raises(Broken, match=rf"newer LunaServe \(version {VERSION + 1}; this one reads {VERSION}\)"):
        DecodeQueue(tmp_path / "spool", tmp_path / "output")
    with create_engine(database).begin() as db:
        db.execute(delete(VERSIONS).where(VERSIONS.c.version > VERSION))
    assert work(tmp_path, job).report(QueueStatus()).counts["done"] == 1
