"""scripts/jobs.py as an operator types it, against a running server without a VAE: every job waits or is dead."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.saving.decode_queue import DecodeQueue
from luna_protocol.save_job import QueueStatus
from serving.torchserve import ROOT, TorchServe
from tests.engine.saving.save_jobs import a_job

pytestmark = pytest.mark.slow


@pytest.fixture
def queue(home: Path) -> Iterator[DecodeQueue]:
    queue = DecodeQueue(home / "spool", home / "output")
    yield queue
    queue.close()


def a_dead_job(queue: DecodeQueue) -> str:
    queue.submit(job := a_job(), {"latent0": torch.zeros(1, 4, 4, 4)}, model="not loaded")
    claim = queue.store.claim("me", "not loaded")
    queue.store.fail(claim, "the picture is NaN", forever=True)
    return job.job_id


def test_dead_jobs_are_listed_retried_cancelled_and_purged(queue: DecodeQueue, torchserve: TorchServe) -> None:
    environment = os.environ | {"LUNA_TOKEN_FILE": str(torchserve.key_file), "COLUMNS": "200"}

    def jobs(*arguments: str) -> tuple[int, str]:
        line = [sys.executable, ROOT / "scripts" / "jobs.py", "--port", str(torchserve.ports.inference), *arguments]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def state(job_id: str) -> str | None:
        found = queue.report(QueueStatus(job_ids=[job_id])).jobs
        return found[0].state if found else None

    first, second = a_dead_job(queue), a_dead_job(queue)
    status, told = jobs("list", "--state", "dead")
    assert status == 0 and first in told and second in told and "the picture is NaN" in told and "2 dead" in told, told
    status, told = jobs("retry", first, "job-nobody-has")
    assert status == 1 and "queued again: 1" in told and "there is no job job-nobody-has" in told, told
    assert (state(first), state(second)) == ("queued", "dead")
    assert jobs("retry") == (0, "queued again: 1\n") and state(second) == "queued"
    assert jobs("cancel", first)[0] == 0 and state(first) == "cancelled"
    assert jobs("purge", first)[0] == 0 and state(first) is None
    queue.store.fail(queue.store.claim("me", "not loaded"), "again", forever=True)
    assert jobs("purge")[0] == 0 and state(second) == "dead", "what can be tried again goes only when it is named"
    assert jobs("purge", "--state", "dead")[0] == 0 and state(second) is None
    status, told = jobs("cancel", "NOT AN ID")
    assert status == 1 and "NOT AN ID" in told and "Traceback" not in told, told
