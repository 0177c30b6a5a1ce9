"""Models come and go within the memory there is, whoever asked for them, and nobody who waits is forgotten."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from comfy_client.server import Server
from handlers.engine.checkpoints import weights_size
from luna_protocol.errors import Full, LunaError, NotFound, OutOfMemory
from luna_protocol.messages import UNetForward, Worker
from serving import keeper as keeper_module
from serving.archives import pack_checkpoint, pack_repository
from serving.keeper import Keeper, Registered
from serving.torchserve import Ports, TorchServe
from tests.checkpoints import write
from tests.conftest import connect


def worker(size: int, used: float = 0, gpu: int | None = None, busy=False) -> Worker:
    last_used = time.time() - used
    return Worker(
        pid=1, state="ready", device="cpu", assigned_gpu=gpu, weights_bytes=size, last_used=last_used, busy=busy
    )


def in_the_way(needed: int, budget: int, workers: dict[str, list[Worker]], gpu: int | None = None) -> list[str]:
    """What goes for a worker that waits for `needed` bytes."""
    waiting = Worker(pid=2, state="waiting", device="cpu", assigned_gpu=gpu, weights_bytes=needed, budget_bytes=budget)
    return Keeper(None, Path())._in_the_way(waiting, workers | {"new.unet": [waiting]})


def test_the_least_recently_used_go_first_and_no_more_than_needed():
    workers = {"a.unet": [worker(40 << 20, 100)], "b.unet": [worker(40 << 20, 300)], "c.unet": [worker(20 << 20, 200)]}
    assert in_the_way(50 << 20, 100 << 20, workers) == ["b.unet", "c.unet"]


def test_a_checkpoint_that_samples_keeps_its_text_encoder_and_vae():
    workers = {"a.unet": [worker(50 << 20, 0, busy=True)], "a.vae": [worker(50 << 20, 900)]}
    assert in_the_way(50 << 20, 100 << 20, workers) == []


def test_what_was_used_a_moment_ago_stays():
    assert in_the_way(9, 10 << 20, {"a.unet": [worker(10 << 20, 1)]}) == []


def test_nothing_goes_for_one_that_would_still_not_fit():
    workers = {"a.unet": [worker(50 << 20, 900)], "b.unet": [worker(50 << 20, 0, busy=True)]}
    assert in_the_way(60 << 20, 100 << 20, workers) == []


def test_other_devices_are_left_alone():
    workers = {"a.unet": [worker(50 << 20, 900, gpu=1)], "b.unet": [worker(50 << 20, 100, gpu=0)]}
    assert in_the_way(40 << 20, 50 << 20, workers, gpu=0) == ["b.unet"]


class Unloading:
    """A server that notes what is unloaded; of `stuck` models it is told that somebody uses them."""

    def __init__(self, *stuck: str) -> None:
        self.stuck, self.unloaded = stuck, []

    def unload(self, model: str, seconds: float) -> None:
        if model in self.stuck:
            raise Full(f"{model} still has requests")
        self.unloaded.append(model)


def made_room(monkeypatch, server: Unloading, workers: dict[str, list[Worker]]) -> list[str]:
    monkeypatch.setattr(keeper_module, "live_workers", lambda _run: dict(workers))
    Keeper(server, Path()).make_room()
    return server.unloaded


def waiting(gpu: int, needed: int, budget: int) -> list[Worker]:
    worker = Worker(pid=2, state="waiting", device="cpu", assigned_gpu=gpu, weights_bytes=needed, budget_bytes=budget)
    return [worker]


def test_each_device_gets_room_in_one_round_and_one_worker_of_each(monkeypatch):
    workers = {
        "never.unet": waiting(0, 500, 100),  # cannot be helped, and comes first
        "new.unet": waiting(0, 50, 100),
        "next.unet": waiting(0, 50, 100),
        "other.unet": waiting(1, 50, 100),
        "a.unet": [worker(60, 900, gpu=0)],
        "b.unet": [worker(40, 100, gpu=0)],
        "c.unet": [worker(60, 900, gpu=1)],
    }
    assert made_room(monkeypatch, Unloading(), workers) == ["a.unet", "c.unet"]


def test_a_model_that_cannot_be_unloaded_does_not_stop_the_others(monkeypatch):
    workers = {
        "new.unet": waiting(0, 50, 100),
        "other.unet": waiting(1, 50, 100),
        "a.unet": [worker(60, 900, gpu=0)],
        "c.unet": [worker(60, 900, gpu=1)],
    }
    assert made_room(monkeypatch, Unloading("a.unet"), workers) == ["c.unet"]


class Registry:
    """A server of two models and of one whose name no address can have; notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def models(self) -> list[str]:
        return ["a.unet", "../../x", "b.unet"]

    def describe_versions(self, model: str) -> list[dict]:
        self.asked.append(model)
        if model == "../../x":
            raise NotFound("no such address")
        versions = ["1.0", "2.0"] if model == "b.unet" else ["1.0"]
        return [{"modelVersion": version, "minWorkers": 3} for version in versions]

    def describe(self, model: str) -> dict:
        self.asked.append(model)
        return {"modelVersion": "2.0"}


def test_each_model_is_asked_for_once_and_one_that_cannot_be_does_not_hide_the_others():
    server = Registry()
    registered = Keeper(server, Path())._registered()
    assert registered == Registered({"a.unet": 3, "b.unet": 3, "b.unet/2.0": 3}, {"b.unet": "2.0"})
    assert server.asked == ["a.unet", "../../x", "b.unet", "b.unet"]


def test_an_unreadable_memory_of_what_was_loaded_loads_everything(tmp_path):
    (tmp_path / "registered.json").write_text('["a"]')
    assert Registered.read(tmp_path) == Registered()


def test_versions_and_their_default_are_remembered_and_other_roles_left_alone(tmp_path):
    before = Registered({"a.unet": 1, "a.vae": 2, "b.unet": 1}, {"c.unet": "3.0"})
    stored = ["a.unet/1.0", "a.unet/2.0", "b.unet", "new.unet"]
    now = before.updated({"a.unet": 1, "a.unet/2.0": 3}, {"a.unet": "2.0"}, stored)
    workers = {"a.unet": 1, "a.unet/2.0": 3, "b.unet": 0, "new.unet": 0, "a.vae": 2}
    assert now == Registered(workers, {"a.unet": "2.0", "c.unet": "3.0"})
    now.write(tmp_path)
    assert Registered.read(tmp_path) == now


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[TorchServe]:
    """A server with the UNets of three checkpoints in its store and room for two on its GPU 0, which is not there."""
    home = tmp_path_factory.mktemp("keeper")
    pack_repository(home / "model_store", home)
    for name in "abc":
        file = write(home / "models" / "checkpoints" / f"{name}.safetensors", "tiny_sd15")
        pack_checkpoint(file, home / "model_store", dtype="fp32", home=home)
    size = weights_size(file, "unet", 4)
    environment = {"CUDA_VISIBLE_DEVICES": "0,1", "LUNA_MEMORY": f"0={size * 2.5 / 1e6:.3f}MB", "OMP_NUM_THREADS": "1"}
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with TorchServe(home / "model_store", home / "run", Ports.free()) as server:
            yield server
    finally:
        os.environ.clear()
        os.environ.update(before)


def sample(server: Server, model: str) -> torch.Tensor:
    tensors = {"x": torch.ones(1, 4, 8, 8), "timesteps": torch.ones(1), "context": torch.ones(1, 77, 64)}
    return server.call(model, UNetForward(), tensors)[1]["out"]


def state(server: Server, model: str) -> list[str]:
    return [worker.state for each in server.index().models if each.name == model for worker in each.workers]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_life_of_models(running, monkeypatch):
    monkeypatch.setattr(keeper_module, "IDLE_SECONDS", 1.5)
    monkeypatch.setattr(keeper_module, "_REMEMBER_EVERY", 2)
    server = connect(running)
    for model in ("repository", "a.unet", "b.unet"):
        server.load(model)
    server.wait_ready(["repository", "a.unet", "b.unet"])
    assert [each.workers[0].assigned_gpu for each in server.index().models if each.workers][:2] == [0, 0]

    # Nobody makes room: the third is refused at once, and says what would help.
    server.load("c.unet")
    server.wait_ready(["c.unet"])
    with pytest.raises(OutOfMemory, match=r"c\.unet needs .* on 0, whose budget of .* holds a\.unet .*unload"):
        sample(server, "c.unet")

    # A name that no address can have: nobody can look after it, and nobody else is the worse for it.
    server._manage("POST", "/models?url=repository.mar&model_name=..%2f..%2fx&synchronous=true")

    # Somebody does: b goes, because a was used later.
    keeper = Keeper(server, running.run)
    keeper.start()
    try:
        time.sleep(2)
        expected = sample(server, "a.unet")
        server.load("c.unet")
        server.wait_ready(["c.unet"])
        deadline = time.monotonic() + 60
        while state(server, "c.unet") != ["ready"] and time.monotonic() < deadline:
            time.sleep(0.5)
        assert sorted(server.models()) == ["../../x", "a.unet", "c.unet", "repository"]
        assert torch.equal(sample(server, "a.unet"), expected)

        # Whoever waits for a model that somebody scales to 0 gets an answer all the same.
        answers = []
        patient = connect(running, answer=500)
        big = {"x": torch.ones(1, 4, 48, 48), "timesteps": torch.ones(1), "context": torch.ones(1, 77, 64)}

        def ask() -> None:
            try:
                answers.append(patient.call("c.unet", UNetForward(), big)[1]["out"].shape)
            except LunaError as error:
                answers.append(error)

        threads = [threading.Thread(target=ask) for _ in range(10)]
        for thread in threads:
            thread.start()
        while not server.pending("c.unet"):
            time.sleep(0.05)
        server.scale("c.unet", 0)
        for thread in threads:
            thread.join(510)
        answered = [each for each in answers if isinstance(each, torch.Size)]
        assert len(answers) == 10 and len(answered) >= 5, answers
    finally:
        keeper.stop()
    registered = Registered.read(running.run).workers
    assert registered.pop("c.unet") in (0, 1)  # the worker that answered may still be there
    assert registered == {
        "repository": 1,
        "a.unet": 1,
        **dict.fromkeys(("b.unet", "a.clip", "b.clip", "c.clip", "a.vae", "b.vae", "c.vae"), 0),
    }
