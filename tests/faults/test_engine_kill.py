"""The engine's process dies, hangs or loses its relay: requests are answered all the same, with the same bits, and
nothing is left behind."""

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest
import torch

from luna_client.faults import WorkerDied
from luna_client.server import Server
from luna_protocol.errors import EngineEnded
from luna_protocol.messages import UNetForward, Worker
from serving.archives import pack_checkpoint, pack_repository
from serving.torchserve import Ports, TorchServe
from tests import checkpoints
from tests.conftest import connect
from tests.faults.test_worker_kill import TENSORS, sample

pytestmark = pytest.mark.slow

BIG = {
    "x": torch.ones(8, 4, 64, 64),
    "timesteps": torch.full((8,), 500.0),
    "context": torch.ones(8, 77, 64),
}


@pytest.fixture(scope="module")
def models(home: Path, serve) -> tuple[str, str]:
    """Two UNets of the session's server."""
    names = []
    for name in ("engine_a", "engine_b"):
        file = checkpoints.write(home / "models" / "checkpoints" / f"{name}.safetensors", "tiny_sd15")
        names += serve(file, ("unet",))
    return tuple(names)


def worker(server: Server, model: str) -> Worker:
    return next(each.workers[0] for each in server.index().models if each.name == model)


def in_a_step(server: Server, model: str, do) -> dict:
    """What a long step came to, during which `do` was done."""
    answers: dict = {}

    def ask() -> None:
        answers["out"] = server.call(model, UNetForward(), BIG)[1]["out"]

    thread = threading.Thread(target=ask)
    thread.start()
    while not worker(server, model).busy:
        pass
    do()
    thread.join(120)
    return answers


def test_an_engine_killed_in_a_step_comes_back_with_all_its_models(server, models):
    first, second = models
    expected, other = server.call(first, UNetForward(), BIG)[1]["out"], sample(server, second)
    pid = worker(server, first).pid
    assert pid == worker(server, second).pid  # one process for both
    relays = [server.describe(model)["workers"][0]["pid"] for model in models]
    answers = in_a_step(server, first, lambda: os.kill(pid, signal.SIGKILL))
    assert torch.equal(answers["out"], expected)
    assert torch.equal(sample(server, second), other)
    assert worker(server, first).pid == worker(server, second).pid != pid
    assert [server.describe(model)["workers"][0]["pid"] for model in models] == relays


def test_a_relay_killed_while_the_engine_computes_costs_nobody_an_answer(server, models):
    first, second = models
    expected, other = server.call(first, UNetForward(), BIG)[1]["out"], sample(server, second)
    engine = worker(server, second).pid
    relay = server.describe(first)["workers"][0]["pid"]
    answers = in_a_step(server, first, psutil.Process(relay).kill)
    assert torch.equal(answers["out"], expected)
    assert torch.equal(sample(server, second), other) and worker(server, second).pid == engine
    server.wait_ready([first])
    assert torch.equal(server.call(first, UNetForward(), BIG)[1]["out"], expected)


def test_an_engine_that_hangs_is_ended_by_its_models_time_limit(home, server, tmp_path):
    specs = tmp_path / "specs"
    specs.mkdir()
    for spec in (Path(__file__).parents[2] / "archive_specs").glob("*.yaml"):
        text = spec.read_text(encoding="utf-8").replace("answer_s: 600", "answer_s: 1")
        (specs / spec.name).write_text(text, encoding="utf-8")
    file = checkpoints.write(home / "models" / "checkpoints" / "hangs.safetensors", "tiny_sd15")
    archives = pack_checkpoint(file, home / "model_store", dtype="fp32", home=home, specs=specs)
    [model] = [archive.model for archive in archives if archive.model.endswith(".unet")]
    server.load(model)
    server.wait_ready([model])
    expected, pid = sample(server, model), worker(server, model).pid
    endless = {"x": torch.ones(32, 4, 96, 96), "timesteps": torch.ones(32), "context": torch.ones(32, 77, 64)}
    with pytest.raises((EngineEnded, WorkerDied)):
        server.call(model, UNetForward(), endless)
    assert torch.equal(sample(server, model), expected)
    assert worker(server, model).pid != pid
    server.unregister(model)


def test_whatever_dies_first_nothing_is_left(tmp_path):
    """The guard ends Java and the relays; the engine goes with them, and takes its socket along."""
    pack_repository(tmp_path / "model_store", tmp_path)
    file = checkpoints.write(tmp_path / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
    pack_checkpoint(file, tmp_path / "model_store", dtype="fp32", home=tmp_path)
    for victim in ("java", "engine", "server"):
        torchserve = TorchServe(tmp_path / "model_store", tmp_path / "run", Ports.free()).start()
        try:
            server = connect(torchserve)
            for model in ("repository", "tiny.unet"):
                server.load(model)
            server.wait_ready(["repository", "tiny.unet"])
            found = worker(server, "tiny.unet")
            engine, door = psutil.Process(found.pid), Path(found.door)
            family = psutil.Process(torchserve._guard.pid).children(recursive=True)
            assert engine in family and door.exists()
            if victim == "java":
                next(process for process in family if "java" in process.name()).kill()
            if victim == "engine":
                engine.kill()
                sample(server, "tiny.unet")
                family += psutil.Process(torchserve._guard.pid).children(recursive=True)
        finally:
            torchserve.stop()
        _, alive = psutil.wait_procs(family, 15)
        assert not alive and not door.exists()
        assert "Fatal Python error" not in torchserve.console.read_text(errors="replace")


def test_a_second_worker_costs_no_second_copy(server, models):
    model = models[0]
    before = psutil.Process(worker(server, model).pid).memory_info().rss
    server.scale(model, 2)
    try:
        server.wait_ready([model])
        relays = [each["pid"] for each in server.describe(model)["workers"]]
        assert len(relays) == 2
        assert [each.weights_bytes for each in next(m for m in server.index().models if m.name == model).workers] == [
            worker(server, model).weights_bytes
        ]
        assert psutil.Process(worker(server, model).pid).memory_info().rss < before + (8 << 20)
        psutil.Process(relays[0]).kill()
        assert sample(server, model) is not None
        assert TENSORS["x"].shape[0] >= 1
    finally:
        server.scale(model, 1)
