"""Models come and go within the memory there is, whoever asked for them, and nobody who waits is forgotten."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.checkpoints import weights_size
from luna_client.manager import Timeouts
from luna_client.server import Server
from luna_protocol.errors import LunaError, NotFound
from luna_protocol.messages import UNetForward, Worker
from serving import keeper as keeper_module
from serving.archives import pack_checkpoint, pack_repository
from serving.keeper import Keeper, Registered
from serving.torchserve import Ports, TorchServe
from tests.checkpoints import write
from tests.conftest import connect


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
    for seed, name in enumerate("abc"):
        file = write(home / "models" / "checkpoints" / f"{name}.safetensors", "tiny_sd15", seed=seed)
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


def workers(server: Server) -> dict[str, Worker]:
    return {model.name: worker for model in server.index().models for worker in model.workers}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_life_of_models(running, monkeypatch):
    monkeypatch.setattr(keeper_module, "IDLE_SECONDS", 1.5)
    monkeypatch.setattr(keeper_module, "EVERY_SECONDS", 2)
    server = connect(running)
    unets = ("a.unet", "b.unet", "c.unet")
    for model in ("repository", *unets):
        server.load(model)
    server.wait_ready(["repository", *unets])

    # Three where two fit: each comes back when it is asked, in the same process, with the same bits.
    before = workers(server)
    assert {worker.assigned_gpu for worker in before.values()} == {None, 0}
    expected = {model: sample(server, model) for model in unets}
    for _ in range(5):
        for model in unets:
            assert torch.equal(sample(server, model), expected[model])
    after = workers(server)
    assert [after[model].resident for model in unets] == [False, True, True]
    assert {after[model].pid for model in unets} == {before["a.unet"].pid}

    # A name that no address can have: nobody can look after it, and nobody else is the worse for it.
    server._manage("POST", "/models?url=repository.mar&model_name=..%2f..%2fx&synchronous=true")

    keeper = Keeper(server, running.run)
    keeper.start()
    try:
        # Whoever waits for a model that somebody scales to 0 gets an answer all the same.
        answers = []
        patient = Server(
            running.inference, running.management, running.key_file, Timeouts(answer=500, patience=300), doors=False
        )
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
        **dict.fromkeys(("repository", "a.unet", "b.unet"), 1),
        **dict.fromkeys(("a.clip", "b.clip", "c.clip", "a.vae", "b.vae", "c.vae"), 0),
    }
