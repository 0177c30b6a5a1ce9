"""The browser hears of jobs from a real queue: one without a server around it, then a real server's."""

import logging
import queue
import threading
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from comfy_client import queue_watch
from comfy_client.account import Accountant
from comfy_client.queue_watch import QueueWatch
from comfy_client.saving import Batch, job_of
from engine.saving.decode_queue import DecodeQueue
from luna_client.server import Server
from luna_protocol.errors import Unavailable
from luna_protocol.messages import validate
from luna_protocol.save_job import SaveAccepted
from serving.torchserve import TorchServe
from tests.engine.saving.save_jobs import a_job, latents


class QueueOnly:
    """A queue that answers as its server would, and fails with `error` while that is set."""

    inference, error = "here", None

    def __init__(self, folder: Path) -> None:
        self.queue = DecodeQueue(folder / "spool", folder / "output")

    def ask(self, request) -> dict:
        if self.error:
            raise self.error
        return self.queue.report(request).model_dump()

    def a_job(self) -> str:
        self.queue.submit(job := a_job(), latents(job))
        return job.job_id

    def a_dead_job(self) -> str:
        job_id = self.a_job()
        claim = self.queue.store.claim("me", "")
        assert claim.job_id == job_id
        self.queue.store.fail(claim, f"reason of {job_id}", forever=True)
        return job_id


@pytest.fixture
def only(tmp_path, monkeypatch) -> Iterator[QueueOnly]:
    monkeypatch.setattr(queue_watch, "_EVERY_SECONDS", 0.01)
    crashes = []
    monkeypatch.setattr(threading, "excepthook", crashes.append)
    only = QueueOnly(tmp_path)
    yield only
    only.queue.close()
    assert not crashes


def test_a_job_that_is_followed_while_the_last_one_is_told_of_is_told_of_once(only):
    jobs, told = [only.a_dead_job() for _ in range(20)], queue.Queue()
    waiting = iter(jobs[1:])

    def tell(event, message):
        told.put(message["message"])
        if (job := next(waiting, None)) is not None:
            watch.follow(only, job, "7")

    watch = QueueWatch(tell)
    watch.follow(only, jobs[0], "7")
    assert [told.get(timeout=30) for _ in jobs] == [f"job {job[:8]} was not saved: reason of {job}" for job in jobs]
    with pytest.raises(queue.Empty):
        told.get(timeout=0.1)


def test_a_browser_that_is_gone_ends_no_watch(only):
    told = queue.Queue()

    def tell(event, message):
        told.put(message)
        if told.qsize() == 1:
            raise RuntimeError("no browser")

    watch = QueueWatch(tell)
    for _ in range(3):
        watch.follow(only, only.a_dead_job(), "7")
    watch.follow(only, only.a_dead_job(), "7")
    for _ in range(4):
        told.get(timeout=30)


@pytest.mark.parametrize("error", [Unavailable("it restarts"), ValueError("a proxy's page is no JSON")], ids=type)
def test_a_server_that_does_not_answer_is_logged_once_and_asked_again(only, caplog, error):
    caplog.set_level(logging.WARNING)
    told = queue.Queue()
    watch = QueueWatch(lambda event, message: told.put(message))
    only.error = error
    watch.follow(only, only.a_dead_job(), "7")
    with pytest.raises(queue.Empty):
        told.get(timeout=0.2)
    only.error = None
    told.get(timeout=30)
    assert len(caplog.records) == 1 and str(error) in caplog.text


def test_jobs_that_wait_for_long_do_not_hide_those_behind_them(only, monkeypatch):
    monkeypatch.setattr(queue_watch, "_AT_ONCE", 2)
    told = queue.Queue()
    watch = QueueWatch(lambda event, message: told.put(message["message"]))
    dead = only.a_dead_job()
    for job in [*(only.a_job() for _ in range(4)), dead]:
        watch.follow(only, job, "7")
    assert dead[:8] in told.get(timeout=30)
    watch._jobs.clear()


@pytest.mark.slow
def test_saved_pictures_are_told_of_once(server: Server, torchserve: TorchServe, served_tiny: str) -> None:
    told: queue.Queue = queue.Queue()
    watch = QueueWatch(lambda event, message: told.put((event, message)))
    promised = {}
    for node in ("7", "8"):
        batch = Batch(1, node, "png", False, latent=torch.zeros(2, 4, 8, 8))
        job, tensors, _ = job_of([batch], {}, filename="watched")
        message, _ = server.call(f"{served_tiny}.vae", job, tensors)
        promised[node] = validate(SaveAccepted, message).files
        watch.follow(server, job.job_id, node)
    for _ in range(2):
        event, message = told.get(timeout=60)
        assert event == "luna.saved" and message["files"] == promised.pop(message["node"])
        assert all(b64decode(thumbnail).startswith(b"\xff\xd8") for thumbnail in message["thumbnails"])
        assert len(message["thumbnails"]) == 2
    with pytest.raises(queue.Empty):
        told.get(timeout=1.5)

    shown = Accountant().account(server, torchserve.metrics)["queue"]
    assert shown["counts"]["done"] >= 2 and any(job["files"][0]["thumbnail"] for job in shown["jobs"])
