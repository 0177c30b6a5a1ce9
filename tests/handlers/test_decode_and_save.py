"""Pictures saved through a real server: accepted at once, done later, and safe from its death."""

import json
import os
import signal
import stat
import time
import urllib.request

import pytest
import torch
from PIL import Image

from luna_client.server import Server
from luna_protocol.blob import pack
from luna_protocol.errors import Impossible, Malformed
from luna_protocol.messages import RepositoryIndex, VaeDecode
from luna_protocol.save_job import CancelJobs, JobStatus, PurgeJobs, QueueReport, QueueStatus, SaveAccepted, SaveJob
from serving.keeper import Registered
from tests.engine.saving.save_jobs import a_job, check_complete


@pytest.fixture(scope="module")
def vae(served_tiny) -> str:
    return f"{served_tiny}.vae"


def save(server: Server, vae: str, job: SaveJob, tensors) -> SaveAccepted:
    return SaveAccepted.model_validate(server.call(vae, job, tensors)[0])


def report(server: Server, model: str, **asked) -> QueueReport:
    return QueueReport.model_validate(server.call(model, QueueStatus(**asked))[0])


def wait_for(server: Server, job: SaveJob, seconds: float = 60) -> JobStatus:
    until = time.monotonic() + seconds
    while True:
        status = report(server, "repository", job_ids=[job.job_id]).jobs[0]
        if status.state in ("done", "dead"):
            return status
        assert time.monotonic() < until, status
        time.sleep(0.1)


def test_a_saved_picture_is_the_decoded_one(server, vae, home):
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    job = a_job("png", "webp", job_id="served-1", filename="%model_name%", prompt={"1": 2})
    reply = save(server, vae, job, {"latent0": latent, "latent1": latent[:1]})
    assert reply.state == "queued" and reply.files[0] == "b_AFFIX0_00.png"
    status = wait_for(server, job)
    check_complete(home / "output", status)
    decoded = server.call(vae, VaeDecode(), {"latent": latent})[1]["pixels"]
    # As ComfyUI's VAE Decode and SaveImage make it.
    expected = (((decoded + 1) / 2).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)
    for row, file in enumerate(status.files[:2]):
        with Image.open(home / "output" / file.path) as image:
            saved = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(64, 64, 3)
            assert (saved.int() - expected[row].int()).abs().max() <= 1, "a batch may round its last bit otherwise"
            assert json.loads(image.text["prompt"]) == {"1": 2}
    assert save(server, vae, job, {"latent0": latent, "latent1": latent[:1]}).state == "done"


def test_the_reply_is_202_and_plain_json_is_answered_so(server, vae):
    key = json.loads(server._tokens.file.read_text())["inference"]["key"]

    def post(model, body, content_type):
        headers = {"Authorization": f"Bearer {key}", "Content-Type": content_type}
        request = urllib.request.Request(f"{server.inference}/predictions/{model}", body, headers)
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read()

    job = a_job(job_id="served-2")
    blob = pack(job, {"latent0": torch.zeros(1, 4, 4, 4)})
    assert post(vae, bytes(blob), "application/octet-stream")[0] == 202
    asked = json.dumps({"kind": "queue_status", "job_ids": ["served-2"]}).encode()
    for model in (vae, "repository"):
        status, body = post(model, asked, "application/json")
        assert status == 200 and json.loads(body)["jobs"][0]["job_id"] == "served-2"


def test_what_cannot_be_saved_is_refused_before_it_is_accepted(server, vae):
    for fields, tensor, error in (
        ({"save_path": "../x"}, torch.zeros(1, 4, 4, 4), Malformed),
        ({}, torch.zeros(1, 3, 4, 4), Malformed),
        ({}, torch.full((1, 4, 4, 4), float("nan")), Impossible),
    ):
        with pytest.raises(error):
            save(server, vae, job := a_job(**fields), {"latent0": tensor})
        assert report(server, "repository", job_ids=[job.job_id]).jobs == []


def test_jobs_survive_the_workers_death(server, vae, home):
    jobs = [a_job("png", job_id=f"killed-{n}") for n in range(12)]
    for n, job in enumerate(jobs):
        save(server, vae, job, {"latent0": torch.randn(1, 4, 16, 16)})
        if n in (3, 9):
            os.kill(worker_of(server, vae), signal.SIGKILL)
    for job in jobs:
        check_complete(home / "output", wait_for(server, job))
    paths = [file.path for status in report(server, vae, limit=100).jobs for file in status.files]
    assert len(set(paths)) == len(paths)
    assert not [path for path in (home / "output").rglob("*") if path.name.endswith(".part")]


def worker_of(server: Server, model: str) -> int:
    while True:
        index = server.ask(RepositoryIndex())
        pids = [worker["pid"] for served in index["models"] if served["name"] == model for worker in served["workers"]]
        if pids:
            return pids[0]
        time.sleep(0.1)


@pytest.mark.skipif(os.name == "nt", reason="on Windows a user's folders are private by themselves")
def test_other_users_can_read_nothing_of_spool_and_run_folder(server, vae, home):
    save(server, vae, job := a_job(save_mode="database_store"), {"latent0": torch.zeros(1, 4, 4, 4)})
    wait_for(server, job)
    Registered({"tiny.vae": 1}).write(home / "run")
    paths = [path for root in ("spool", "run") for path in (home / root, *(home / root).rglob("*"))]
    found = {path.relative_to(home).as_posix(): stat.filemode(path.stat().st_mode) for path in paths}
    assert {"spool/jobs.sqlite3-wal", "spool/pictures.sqlite3", "run/key_file.json", "run/logs/ts_log.log"} <= {*found}
    assert any(name.startswith("run/engines/") for name in found)
    # Kernels that torch compiled, and our own code, hold nothing of a request.
    of_people = {name: mode for name, mode in found.items() if not name.startswith(("run/compiled", "run/code"))}
    readable = {name: mode for name, mode in of_people.items() if mode not in ("drwx------", "-rw-------")}
    assert not readable


def test_cancel_and_purge_through_either_model(server, vae):
    save(server, vae, job := a_job(), {"latent0": torch.zeros(1, 4, 4, 4)})
    wait_for(server, job)
    reply = server.ask(CancelJobs(job_ids=[job.job_id]))
    assert reply["unchanged"] == {job.job_id: "the job is done"}
    assert server.call(vae, PurgeJobs(job_ids=[job.job_id]))[0]["changed"] == [job.job_id]
    assert report(server, vae, job_ids=[job.job_id]).jobs == []


def test_the_queue_shows_in_the_metrics(server, vae, torchserve):
    save(server, vae, job := a_job(), {"latent0": torch.zeros(1, 4, 4, 4)})
    wait_for(server, job)
    until = time.monotonic() + 30
    wanted = {"DecodeQueueTotal_count", "DecodeQueueDecode_bucket", "DecodeQueueDoneJobs", "DecodeQueueBytes"}
    while True:
        with urllib.request.urlopen(f"{torchserve.metrics}/metrics") as reply:
            text = reply.read().decode()
        missing = {name for name in wanted if f'{name}{{ModelName="{vae}"' not in text}
        if not missing:
            break
        assert time.monotonic() < until, (missing, [line for line in text.splitlines() if "Decode" in line])
        time.sleep(0.3)
