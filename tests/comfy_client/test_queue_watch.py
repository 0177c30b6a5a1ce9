"""The browser hears of jobs from a real server's queue."""

import queue
from base64 import b64decode

import pytest
import torch

from comfy_client.account import Accountant
from comfy_client.queue_watch import QueueWatch
from comfy_client.saving import Batch, job_of
from comfy_client.server import Server
from luna_protocol.messages import validate
from luna_protocol.save_job import SaveAccepted
from serving.torchserve import TorchServe

pytestmark = pytest.mark.slow


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
