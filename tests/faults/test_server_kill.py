"""Two servers share a spool, and one is killed with all that it started: every picture is made, and made once."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from engine.saving.decode_queue import DecodeQueue
from luna_client.faults import Unreachable
from luna_client.server import Server
from luna_protocol.messages import RepositoryIndex
from luna_protocol.save_job import QueueStatus
from serving.archives import pack_checkpoint, pack_repository
from serving.specs import FOLDER
from serving.torchserve import Ports, TorchServe
from tests.checkpoints import write
from tests.conftest import connect
from tests.engine.saving.postgres import postgres
from tests.engine.saving.save_jobs import a_job, check_each_done_once, latents

MODELS = ("repository", "tiny.vae")
JOBS = 20


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request) -> Iterator[str | None]:
    """The URL of the queue's database, None for the one in the spool folder."""
    with ExitStack() as stack:
        yield stack.enter_context(postgres()) if request.param == "postgresql" else None


@pytest.fixture
def servers(database: str | None, tmp_path: Path, monkeypatch) -> Iterator[list[TorchServe]]:
    """Two, each with a run folder of its own; store, spool and output are one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # What the killed one leaves there goes with it; under tmp_path, sockets' paths would be too long.
    temporary = tempfile.mkdtemp(prefix="luna-kill-")
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    specs = Path(shutil.copytree(FOLDER, tmp_path / "specs"))
    for role, keys in {"repository": ["queue_database"], "vae": ["queue_database", "pictures_database"]}.items():
        spec = yaml.safe_load((specs / f"{role}.yaml").read_text())
        spec["handler"] |= dict.fromkeys(keys, database)
        (specs / f"{role}.yaml").write_text(yaml.safe_dump(spec))
    store = tmp_path / "model_store"
    pack_repository(store, tmp_path, specs)
    file = write(tmp_path / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
    pack_checkpoint(file, store, dtype="fp32", home=tmp_path, specs=specs)
    with ExitStack() as stack:
        started = [stack.enter_context(TorchServe(store, tmp_path / f"run{n}", Ports.free())) for n in (1, 2)]
        for torchserve in started:
            load(connect(torchserve))
        for torchserve in started:
            connect(torchserve).wait_ready(MODELS)
        yield started
    shutil.rmtree(temporary)


def load(server: Server) -> None:
    for model in MODELS:
        server.load(model)


def kill(torchserve: TorchServe) -> None:
    """As the kernel does it for want of memory, but to all of them."""
    guard = psutil.Process(torchserve._guard.pid)
    for process in [guard, *guard.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    guard.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_killed_server_accepted_another_does_once(servers, database: str | None, tmp_path: Path) -> None:
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "output", database=database)
    clients = [connect(torchserve, patience=5) for torchserve in servers]
    jobs = [a_job("png", job_id=f"shared-{n}", save_mode="database_store") for n in range(JOBS)]
    for n, job in enumerate(jobs):
        clients[n % 2].call("tiny.vae", job, latents(job, rows=2, size=32))
    while not queue.report(QueueStatus(limit=0)).counts["done"]:
        time.sleep(0.01)
    kill(servers[0])
    counts = queue.report(QueueStatus(limit=0)).counts
    assert counts["queued"] + counts["running"] > JOBS // 4, "it was killed with work before it"

    begun = time.monotonic()
    with pytest.raises(Unreachable):
        clients[0].ask(RepositoryIndex())
    told = time.monotonic() - begun
    until = begun + 300
    while (counts := queue.report(QueueStatus(limit=0)).counts)["done"] < JOBS:
        assert time.monotonic() < until and not counts["dead"], counts
        time.sleep(0.05)
    done = time.monotonic() - begun
    pictures = database or f"sqlite:///{tmp_path / 'spool' / 'pictures.sqlite3'}"
    check_each_done_once(tmp_path / "output", queue, jobs, pictures)

    # Started again, the same client knows the new server's tokens, and the queue is what it was.
    begun = time.monotonic()
    with servers[0]:
        load(clients[0])
        clients[0].wait_ready(MODELS)
        report = clients[0].ask(QueueStatus(limit=0))
    assert report["counts"]["done"] == JOBS
    print(f"told in {told:.2f} s, its jobs done {done:.1f} s later, back in {time.monotonic() - begun:.1f} s")
    check_each_done_once(tmp_path / "output", queue, jobs, pictures)
    queue.close()
