"""A row per picture, the same in SQLite and PostgreSQL, and never two for one picture."""

import time

import pytest
from sqlalchemy import select, text

from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.picture_records import PICTURES, PictureRecords
from luna_protocol.save_job import Heatmap, QueueStatus
from tests.engine.saving.postgres import postgres
from tests.engine.saving.save_jobs import a_job, check_complete, decode, latents, wait_for

METADATA = {
    "model": "photo/dream.safetensors",
    "positive": "a cat, 日本 \0 \ud83d half",
    "negative": "dog",
    "seed": 2**64 - 1,
    "steps": 25,
    "cfg": 7.5,
    "denoise": float("nan"),
    "clip_skip": "minus two",
    "lora_count": 1e300,
    "loras": [{"name": "ink", "strength": 0.8}],
    "fb_cache_enabled": True,
    "something_else": {"nested": [1, None]},
}


@pytest.fixture(scope="module")
def server():
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'pictures.sqlite3'}"
    return request.getfixturevalue("server")


@pytest.fixture
def records(url):
    made = PictureRecords(url)
    yield made
    made.close()


def rows_of(url: str, job) -> list:
    records = PictureRecords(url)
    with records.engine.connect() as db:
        rows = db.execute(select(PICTURES).where(PICTURES.c.job_id == job.job_id).order_by(PICTURES.c.position))
        found = rows.mappings().all()
    records.close()
    return found


def a_stored_job(**fields):
    heatmap = Heatmap(tensor="heat", polarity="positive", stage="original", label="cat")
    return a_job("png", "webp", heatmaps=[heatmap], metadata=METADATA, save_mode="database_store", **fields)


def tensors_of(job):
    return latents(job, rows=2) | {"heat": latents(job)["latent0"][0, 0]}


def test_every_picture_gets_its_row(tmp_path, url, records):
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "output")
    worker = DecodeWorker(queue, decode, records=records)
    worker.start()
    flow = {"nodes": [{"title": "nul \0 here"}]}
    job = a_stored_job(prompt={"1": {"x": float("inf")}}, extra_pnginfo={"workflow": flow}, client="me")
    plain = a_job(save_mode="daemon")
    queue.submit(job, tensors_of(job))
    queue.submit(plain, latents(plain))
    status = wait_for(queue, job)
    wait_for(queue, plain)
    worker.stop()
    queue.close()
    rows = rows_of(url, job)
    assert rows_of(url, plain) == []
    pictures = [file for file in status.files if file.kind == "picture"]
    assert [(row["path"], row["sha256"], row["bytes"]) for row in rows] == [
        (file.path, file.sha256, file.bytes) for file in pictures
    ]
    assert [(row["image_type"], row["format"], row["batch_index"]) for row in rows] == [
        ("AFFIX0", "png", 0),
        ("AFFIX0", "png", 1),
        ("AFFIX1", "webp", 0),
        ("AFFIX1", "webp", 1),
    ]
    first = rows[0]
    assert (first["width"], first["height"], first["client"], first["discarded"]) == (32, 32, "me", False)
    assert (first["model_name"], first["model_path"]) == ("dream", "photo/dream")
    assert first["positive"] == "a cat, 日本  ? half" and first["seed"] == str(2**64 - 1)
    assert (first["steps"], first["cfg"], first["denoise"], first["clip_skip"]) == (25, 7.5, None, None)
    assert first["lora_count"] is None and first["fb_cache_enabled"] is True
    assert first["metadata"]["something_else"] == {"nested": [1, None]} and first["metadata"]["denoise"] is None
    assert first["workflow"] == {"nodes": [{"title": "nul  here"}]} and first["prompt"] == {"1": {"x": None}}
    heatmaps = status.files[-1].path
    assert [(heat["path"], heat["tensor"], heat["label"]) for heat in first["heatmaps"]] == [(heatmaps, "heat", "cat")]


def test_written_again_a_row_stays_one(tmp_path, url, records):
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "output")
    job = a_stored_job()
    queue.submit(job, tensors_of(job))
    worker = DecodeWorker(queue, decode, records=records)
    worker.start()
    wait_for(queue, job)
    files = [file for file in queue.store.files(1) if file.kind == "picture"]
    before = rows_of(url, job)
    records.store(job, files, before[0]["heatmaps"][0]["path"])
    assert rows_of(url, job) == before and len(before) == 4
    worker.stop()
    queue.close()


def test_a_job_waits_for_its_database_and_holds_up_no_other(tmp_path, records, url):
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "output")
    worker = DecodeWorker(queue, decode, records=records)
    with records.engine.begin() as db:
        db.execute(text("ALTER TABLE luna_pictures RENAME TO luna_away"))
    worker.start()
    queue.submit(recorded := a_stored_job(), tensors_of(recorded))
    queue.submit(other := a_job(), latents(other))
    wait_for(queue, other)
    until = time.monotonic() + 30
    while not (status := queue.report(QueueStatus(job_ids=[recorded.job_id])).jobs[0]).reason:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert "luna_pictures" in status.reason and status.state in ("queued", "running")
    with records.engine.begin() as db:
        db.execute(text("ALTER TABLE luna_away RENAME TO luna_pictures"))
    check_complete(tmp_path / "output", wait_for(queue, recorded))
    assert len(rows_of(url, recorded)) == 4
    worker.stop()
    queue.close()


def test_the_queue_itself_in_postgresql(tmp_path, server):
    """Two workers on two spools, as on two machines, share the jobs of one database and one output folder."""
    done_by, workers = ([], []), []
    for n in range(2):
        queue = DecodeQueue(tmp_path / f"spool{n}", tmp_path / "output", database=server)
        records = PictureRecords(server)
        worker = DecodeWorker(
            queue, lambda latent, n=n: (done_by[n].append(1), time.sleep(0.02), decode(latent))[2], records=records
        )
        worker.start()
        workers.append((queue, worker, records))
    jobs = [a_job("png", save_mode="database_store", filename="x", client=f"c{n % 3}") for n in range(30)]
    for n, job in enumerate(jobs):
        workers[n % 2][0].submit(job, latents(job))
    statuses = [wait_for(workers[0][0], job) for job in jobs]
    for job, status in zip(jobs, statuses, strict=True):
        check_complete(tmp_path / "output", status)
        assert len(rows_of(server, job)) == 1
    assert all(done_by) and sum(map(len, done_by)) == 30
    assert len({status.files[0].path for status in statuses}) == 30
    for queue, worker, records in workers:
        worker.stop()
        queue.close()
        records.close()
