"""An engine in this process: holding and letting go, what fails to load, memory that runs out, a device that breaks."""

import gc
import logging
import threading
import weakref

import psutil
import pytest
import torch

from engine import roles
from engine.engine import Engine
from engine.faults import BROKEN_DEVICE
from engine.roles.unet import UNetRole
from engine.roles.vae import VaeRole
from engine.unet import UNet
from luna_protocol.blob import pack, unpack
from luna_protocol.errors import Broken, OutOfMemory, from_json
from luna_protocol.messages import UNetForward, VaeDecode
from tests import checkpoints

SHAPE = checkpoints.SHAPES["tiny_sd15"].unet


@pytest.fixture
def home(tmp_path):
    for seed, name in enumerate(("a", "b")):
        checkpoints.write(tmp_path / "models" / "checkpoints" / f"{name}.safetensors", "tiny_sd15", seed=seed)
    return tmp_path


def settings(home, name="a", role="unet", **fields):
    return {"role": role, "home": str(home), "family": "sd15", "checkpoint": f"{name}.safetensors", **fields}


def step(seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, context = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, SHAPE.context, generator=draw)
    return pack(UNetForward(), {"x": x, "timesteps": torch.full((2,), 500.0), "context": context})


def out(answer):
    assert answer.status == 200, answer.body
    return unpack(bytearray(answer.body))[1]["out"]


def test_holders_share_one_copy_and_the_last_one_takes_it_along(home):
    engine, first, second = Engine("cpu"), object(), object()
    model = engine.hold("a.unet", settings(home), first, 600)
    weights = next(model.role.unet.model.parameters())
    assert engine.hold("a.unet", settings(home), second, 600) is model
    expected = out(engine.predict("a.unet", step(), "me"))
    engine.release(model, first)
    assert torch.equal(out(engine.predict("a.unet", step(), "me")), expected)
    watched = weakref.ref(weights)
    engine.release(model, second)
    del model, weights
    assert watched() is None and not engine.is_wanted
    assert from_json(engine.predict("a.unet", step(), "me").body).code == "not_loaded"


def test_two_models_that_do_not_fit_together_take_turns_with_the_same_bits(home, monkeypatch):
    monkeypatch.setenv("LUNA_MEMORY", "cpu=1GB")
    engine, models = Engine("cpu"), ("a.unet", "b.unet")
    holds = {name: engine.hold(name, settings(home, name[0], step_cache_mb=0), object(), 600) for name in models}
    engine.residency.budget = int(1.5 * holds["a.unet"].role.weights.nbytes)
    expected = {name: out(engine.predict(name, step(), "me")) for name in models}
    for _ in range(20):
        for name in models:
            assert torch.equal(out(engine.predict(name, step(), "me")), expected[name])
            assert engine.residency.held() <= engine.residency.budget
            resident = [each.role.weights.resident for each in holds.values()]
            assert resident == [name == other for other in models]


def test_a_model_larger_than_the_budget_says_so_and_leaves_the_others_alone(home, monkeypatch):
    monkeypatch.setenv("LUNA_MEMORY", "cpu=1MB")
    engine = Engine("cpu")
    model = engine.hold("a.unet", settings(home), object(), 600)
    assert isinstance(model.failure, OutOfMemory) and "a.unet needs" in str(model.failure)
    assert from_json(engine.predict("a.unet", step(), "me").body).code == "out_of_memory"
    assert engine.status()["a.unet"]["state"] == "failed" and engine.residency.held() == 0


@pytest.mark.parametrize("broken", [{"checkpoint": "none.safetensors"}, {"dtype": "fp7"}])
def test_what_does_not_load_says_why_to_everybody(home, broken):
    engine = Engine("cpu")
    model = engine.hold("a.unet", settings(home) | broken, object(), 600)
    assert isinstance(model.failure, Broken)
    for _ in range(2):
        error = from_json(engine.predict("a.unet", step(), "me").body)
        assert error.code == "broken" and error.message == model.failure.message
    assert engine.hold("b.unet", settings(home, "b"), object(), 600).failure is None


@pytest.fixture
def unlogged():
    """pytest keeps what is logged, with its errors' frames."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_a_load_that_runs_out_of_memory_leaves_none_behind(home, monkeypatch, unlogged):
    """Its error's frames held the weights, and the model's every answer raised it again."""
    seen = []

    def warm_up(role):
        seen.append(weakref.ref(next(role.unet.model.parameters())))
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(UNetRole, "warm_up", warm_up)
    engine = Engine("cpu")
    model = engine.hold("a.unet", settings(home), object(), 600)
    assert isinstance(model.failure, OutOfMemory) and model.failure.__traceback__ is None
    assert seen[0]() is None and model.worker.weights_bytes == 0


def test_a_vae_that_fails_claims_no_jobs(home, monkeypatch):
    monkeypatch.setattr(VaeRole, "warm_up", lambda role: 1 / 0)
    before = threading.active_count()
    engine = Engine("cpu")
    assert engine.hold("a.vae", settings(home, role="vae"), object(), 600).failure
    assert not (home / "spool").exists() and threading.active_count() == before + 1  # the compute thread


def test_memory_that_runs_out_is_tried_once_more_without_caches(home, monkeypatch):
    engine = Engine("cpu")
    model = engine.hold("a.unet", settings(home), object(), 600)
    expected = out(engine.predict("a.unet", step(), "me"))
    forward, failures, dropped = UNet.forward, [1], []
    monkeypatch.setattr(UNetRole, "drop_caches", lambda role: dropped.append(role.name))

    def short_of_memory(self, *arguments, **more):
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *arguments, **more)

    monkeypatch.setattr(UNet, "forward", short_of_memory)
    assert torch.equal(out(engine.predict("a.unet", step(), "me")), expected) and dropped == ["a.unet"]
    failures += [1, 1]
    error = from_json(engine.predict("a.unet", step(), "me").body)
    assert error.code == "out_of_memory" and "smaller" in error.hint
    assert model.worker.state == "ready"


def test_errors_keep_no_tensors(home, monkeypatch, unlogged):
    engine = Engine("cpu")
    engine.hold("a.unet", settings(home), object(), 600)
    forward, seen = UNet.forward, []

    def broken(self, x, *arguments, **more):
        seen.append(weakref.ref(x))
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(UNet, "forward", broken)
    assert from_json(engine.predict("a.unet", step(), "me").body).code == "internal"
    monkeypatch.setattr(UNet, "forward", forward)
    assert out(engine.predict("a.unet", step(), "me")) is not None
    gc.collect()
    assert seen[0]() is None


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: device-side assert triggered", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_device_that_is_lost_ends_the_engine(home, monkeypatch, text, ends):
    ended = []
    engine = Engine("cpu", ended.append)
    engine.hold("a.unet", settings(home), object(), 600)

    def broken(*arguments, **more):
        raise RuntimeError(text)

    monkeypatch.setattr(UNet, "forward", broken)
    assert engine.predict("a.unet", step(), "me").status == 500
    assert ended == ([BROKEN_DEVICE] if ends else [])


def test_a_forward_that_hangs_is_overdue(home, monkeypatch):
    engine = Engine("cpu")
    engine.hold("a.unet", settings(home), object(), 0.2)
    go, begun = threading.Event(), threading.Event()
    monkeypatch.setattr(UNet, "forward", lambda *arguments, **more: (begun.set(), go.wait(20)))
    thread = threading.Thread(target=engine.predict, args=("a.unet", step(), "me"))
    thread.start()
    begun.wait(10)
    deadline = threading.Event()
    while engine.overdue() is None:
        deadline.wait(0.05)
    assert engine.overdue() == "a.unet"
    go.set()
    thread.join(10)
    assert engine.overdue() is None


def test_a_vae_decodes_between_other_peoples_requests(home):
    engine = Engine("cpu")
    engine.hold("a.vae", settings(home, role="vae"), object(), 600)
    answer = engine.predict("a.vae", pack(VaeDecode(), {"latent": torch.zeros(1, 4, 8, 8)}), "me")
    assert answer.status == 200
    assert engine.status()["a.vae"]["busy"] is False
    assert engine.status()["a.vae"]["weights_bytes"] < psutil.Process().memory_info().rss


def test_every_role_has_its_class():
    for name in ("unet", "clip", "vae"):
        assert roles.role_class(name).accepts
