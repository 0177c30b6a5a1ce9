"""Step caching as clients of a real TorchServe see it."""

import re
import time

import pytest
import torch
import urllib3
from safetensors.torch import save_file

from luna_protocol.errors import Impossible, Malformed
from luna_protocol.messages import LoraUse, StepCache, UNetForward
from tests import checkpoints

WIDTH = checkpoints.SHAPES["tiny_sd15"].unet.channels


@pytest.fixture(scope="module")
def loras(home):
    """Two LoRAs of one layer, and how requests name them."""
    folder = home / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    for name in ("left", "right"):
        prefix = "diffusion_model.input_blocks.1.1.proj_in"
        up, down = torch.randn(2, WIDTH, 4, generator=generator)
        tensors = {
            f"{prefix}.lora_up.weight": up[..., None, None],
            f"{prefix}.lora_down.weight": down.T[..., None, None],
        }
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"cache_{name}.safetensors")
    return [LoraUse(name=f"cache_{name}.safetensors") for name in ("left", "right")]


class Client:
    """A sampling run over the wire; without a policy the requests carry no step cache."""

    def __init__(self, server, seed, lora, session=None, **settings):
        generator = torch.Generator().manual_seed(seed)
        self.server, self.session, self.lora, self.settings = server, session, lora, settings
        self.x = torch.randn(1, 4, 8, 8, generator=generator)
        self.context = torch.randn(2, 77, checkpoints.SHAPES["tiny_sd15"].unet.context, generator=generator)
        self.count, self.hits = 0, []

    def request(self):
        cache = None
        if self.session:
            cache = StepCache(session=self.session, step=self.count, conds=["uncond", "cond"], **self.settings)
        tensors = {
            "x": torch.cat([self.x, self.x]),
            "timesteps": torch.full((2,), 999.0 - 50 * self.count),
            "context": self.context,
        }
        return self.server.call("tiny.unet", UNetForward(lora=[self.lora], step_cache=cache), tensors)

    def step(self):
        message, tensors = self.request()
        self.report = message.get("step_cache")
        self.hits.append(bool(self.report and all(self.report["hits"])))
        uncond, cond = tensors["out"].chunk(2)
        self.x = self.x - 0.05 * (uncond + 4 * (cond - uncond))
        self.count += 1


EAGER = {"policy": "first_block", "parameters": {"residual_threshold": 10, "max_consecutive_hits": 2}}
FORESEEN = {"policy": "forecast", "parameters": {"interval": 3}}


@pytest.mark.parametrize("settings", [EAGER, FORESEEN], ids=["first_block", "forecast"])
def test_sessions_interleaved_are_what_each_is_alone(server, served_tiny, loras, settings):
    def clients(name):
        return [Client(server, seed, lora, f"{name} {seed}", **settings) for seed, lora in enumerate(loras)]

    alone, together = clients(f"alone {settings}"), clients(f"together {settings}")
    for client in alone:
        for _ in range(7):
            client.step()
    for _ in range(7):
        for client in together:
            client.step()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.x, other.x) and one.hits == other.hits and any(one.hits)
    assert not torch.equal(alone[0].x, alone[1].x)


def test_a_cache_that_is_off_or_never_hits_changes_no_bit(server, served_tiny, loras):
    plain = Client(server, 3, loras[0])
    off = Client(server, 3, loras[0], "never", parameters={"residual_threshold": 0})
    for _ in range(4):
        plain.step(), off.step()
        assert torch.equal(plain.x, off.x)
        assert plain.report is None and off.report == {"hits": [False, False], "seconds_saved": 0.0}


def test_a_retry_answers_the_same_and_another_lora_is_a_miss(server, served_tiny, loras):
    client = Client(server, 4, loras[0], "retried", **EAGER)
    client.step()
    (first, out), (again, out_again) = client.request(), client.request()
    assert first["step_cache"]["hits"] == [True, True] == again["step_cache"]["hits"]
    assert torch.equal(out["out"], out_again["out"])
    client.step()
    client.lora = loras[1]
    message, tensors = client.request()
    assert message["step_cache"]["hits"] == [False, False]
    client.session = None
    assert torch.equal(client.request()[1]["out"], tensors["out"])


def test_hits_and_seconds_saved_are_told_and_counted(server, served_tiny, torchserve, loras):
    time.sleep(REPORTED_SECONDS)  # what the tests before this one left
    before = counters(torchserve)
    client, saved = Client(server, 6, loras[0], "counted", **EAGER), 0.0
    for _ in range(6):
        client.step()
        saved += client.report["seconds_saved"]
    time.sleep(REPORTED_SECONDS)
    after = counters(torchserve)
    assert client.hits == [False, True, True, False, True, True] and saved > 0
    assert after["StepCacheHits"] - before["StepCacheHits"] == 8
    assert after["StepCacheMisses"] - before["StepCacheMisses"] == 4
    assert after["StepCacheSecondsSaved"] - before["StepCacheSecondsSaved"] == pytest.approx(saved, rel=0.01)


REPORTED_SECONDS = 3  # the engine reports once a second, and TorchServe reads lines in its own time


def counters(torchserve):
    page = urllib3.PoolManager().request("GET", f"{torchserve.metrics}/metrics").data.decode()
    found = re.findall(r"^(StepCache\w+)\{[^}]*tiny\.unet[^}]*\} (\S+)$", page, re.MULTILINE)
    return {"StepCacheHits": 0.0, "StepCacheMisses": 0.0, "StepCacheSecondsSaved": 0.0} | {
        name: float(value) for name, value in found
    }


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"policy": "teacache"}, Impossible, "first_block, deep_cache, forecast"),
        ({"parameters": {"treshold": 0.1}}, Malformed, "treshold"),
        ({"preset": "fast"}, Impossible, "tune_step_cache"),
        ({"policy": "deep_cache", "parameters": {"branch": 30}}, Impossible, "at most 5"),
    ],
)
def test_bad_settings_are_told(server, served_tiny, loras, settings, error, told):
    with pytest.raises(error, match=told):
        Client(server, 7, loras[0], "bad", **settings).request()


def test_rows_and_conds_must_agree(server, served_tiny, loras):
    client = Client(server, 8, loras[0], "short")
    client.x = client.x.repeat(2, 1, 1, 1)
    client.context = client.context.repeat(2, 1, 1)
    client.settings = {}
    request = UNetForward(step_cache=StepCache(session="short", step=0, conds=["uncond", "cond"]))
    tensors = {"x": torch.cat([client.x] * 2), "timesteps": torch.zeros(4), "context": client.context}
    with pytest.raises(Impossible, match="x has 4 rows"):
        server.call("tiny.unet", request, tensors)
