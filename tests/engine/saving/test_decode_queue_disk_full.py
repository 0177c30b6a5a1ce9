"""A full disk costs time, never a picture: nothing half-written stays, and nothing that was accepted is lost."""

import time

import pytest

from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.job_store import Limits
from engine.saving.picture_records import PictureRecords
from luna_protocol.errors import Unavailable
from luna_protocol.save_job import QueueStatus
from tests.engine.saving.save_jobs import a_job, check_complete, decode, files_under, latents, wait_for
from tests.engine.saving.small_disk import filled, small_disk

FAST = Limits(attempts=2, backoff=0.05, backoff_cap=0.2)


def status_of(queue, job):
    return queue.report(QueueStatus(job_ids=[job.job_id])).jobs[0]


def test_output_full(tmp_path):
    with small_disk(tmp_path / "output", megabytes=4) as output:
        queue = DecodeQueue(tmp_path / "spool", output, FAST)
        worker = DecodeWorker(queue, decode, records=PictureRecords(f"sqlite:///{tmp_path / 'p.sqlite3'}"))
        queue.submit(job := a_job("png", "png"), latents(job, rows=2, size=16))
        with filled(output):
            worker.start()
            until = time.monotonic() + 30
            while "No space left" not in status_of(queue, job).reason:
                assert time.monotonic() < until
                time.sleep(0.02)
            time.sleep(1.0)
            status = status_of(queue, job)
            assert status.state in ("queued", "running"), "more tries than Limits.attempts do not kill it"
            assert {name for name in files_under(output) if not name.endswith(".part")} == {"ballast"}
        check_complete(output, status := wait_for(queue, job))
        assert files_under(output) == {file.path for file in status.files}
        worker.stop()
        queue.close()


def test_spool_full(tmp_path):
    with small_disk(tmp_path / "spool", megabytes=8) as spool:
        queue = DecodeQueue(spool, tmp_path / "output", FAST)
        worker = DecodeWorker(queue, decode, records=PictureRecords(f"sqlite:///{tmp_path / 'p.sqlite3'}"))
        queue.submit(accepted := a_job(), latents(accepted))
        with filled(spool):
            with pytest.raises(Unavailable, match="full") as refused:
                for _ in range(20):
                    queue.submit(job := a_job(), latents(job, size=64))
            assert refused.value.retry_after
            worker.start()
            time.sleep(1.0)
        queue.submit(job, latents(job, size=64))
        for each in (accepted, job):
            check_complete(tmp_path / "output", wait_for(queue, each))
        known = queue.report(QueueStatus()).jobs
        assert files_under(tmp_path / "output") == {file.path for status in known for file in status.files}
        worker.stop()
        queue.close()
