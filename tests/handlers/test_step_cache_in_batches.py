"""Requests that wait together and run as one forward: step caching beside other clients' rows, LoRAs and faults."""

import json

import pytest
import torch
from safetensors.torch import save_file

from engine.engine import Engine
from engine.role import Item
from engine.scheduler import Call
from luna_protocol.blob import pack, unpack
from luna_protocol.errors import Broken, Impossible, from_json
from luna_protocol.messages import LoraUse, StepCache, UNetForward, parse_request
from tests import checkpoints

SHAPE = checkpoints.SHAPES["tiny_sd15"].unet


class Served:
    """A UNet in an engine of this process."""

    def __init__(self, home, **settings):
        settings = {"role": "unet", "home": str(home), "family": "sd15", "checkpoint": "tiny.safetensors", **settings}
        self.engine = Engine("cpu")
        self.model = self.engine.hold("tiny.unet", settings, self, 600)

    def answer(self, *requests):
        """(message, tensors) for a reply, the error for an error, of requests that wait together."""
        if len(requests) == 1:
            body = bytearray(self.engine.predict("tiny.unet", *requests, "test").body)
            return [from_json(body) or unpack(body)]
        calls = []
        for request in requests:
            message, tensors = unpack(request)
            item = Item(parse_request(message, (UNetForward,)), tensors)
            calls.append(Call(self.model.role, item, "test"))
        self.engine.scheduler.submit(*calls)
        return [self._outcome(call) for call in calls]

    def _outcome(self, call):
        if error := call.outcome.exception(60):
            return error
        reply = call.outcome.result()
        return reply.message.model_dump(), reply.tensors


@pytest.fixture
def served(home, tmp_path):
    checkpoints.write(tmp_path / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
    (tmp_path / "models" / "loras").mkdir()
    generator = torch.Generator().manual_seed(5)
    for name in ("left", "right"):
        tensors = {}
        for block in ("input_blocks.1.1", "middle_block.1", "output_blocks.5.1"):
            width = SHAPE.channels * (2 if block.startswith("middle") else 1)
            up, down = torch.randn(2, width, 4, generator=generator) / 2
            prefix = f"diffusion_model.{block}.proj_in"
            tensors[f"{prefix}.lora_up.weight"] = up[..., None, None].contiguous()
            tensors[f"{prefix}.lora_down.weight"] = down.T[..., None, None].contiguous()
        save_file(tensors, tmp_path / "models" / "loras" / f"{name}.safetensors")
    return lambda **settings: Served(tmp_path, **settings)


def request(seed, step, lora=None, session=None, free_u=(), **settings):
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(2, 77, SHAPE.context, generator=generator)
    cache = session and StepCache(session=session, step=step, conds=["uncond", "cond"], **settings)
    message = UNetForward(lora=[LoraUse(name=f"{lora}.safetensors")] if lora else [], step_cache=cache, free_u=free_u)
    x = x.repeat(2, 1, 1, 1) * (1 - step / 20)
    return pack(message, {"x": x, "timesteps": torch.full((2,), 900.0 - 50 * step), "context": text})


EAGER = {"parameters": {"residual_threshold": 10}}


@pytest.mark.parametrize("overlay_mb", [64, 0], ids=["merged", "beside the weights"])
def test_rows_that_leave_a_batch_never_shift_anothers_loras(served, overlay_mb):
    rows = [{"seed": 1, "lora": "left", "session": "a", **EAGER}, {"seed": 2, "lora": "right"}, {"seed": 3}]
    alone, together = served(lora_overlay_mb=overlay_mb), served(lora_overlay_mb=overlay_mb)
    for step in range(3):
        expected = [alone.answer(request(step=step, **row))[0] for row in rows]
        got = together.answer(*(request(step=step, **row) for row in rows))
        for (message, tensors), (message_alone, tensors_alone) in zip(got, expected, strict=True):
            assert torch.allclose(tensors["out"], tensors_alone["out"], atol=1e-4)
            assert message["unmerged"] == message_alone["unmerged"]
        assert got[0][0]["step_cache"]["hits"] == [step > 0] * 2
        assert got[1][0]["step_cache"] is None


def test_a_fault_in_a_batch_costs_no_one_elses_hit(served):
    unet = served()
    unet.answer(request(1, 0, session="a", **EAGER))
    (message, _), error = unet.answer(
        request(1, 1, session="a", **EAGER), request(2, 1, session="b", policy="none such")
    )
    assert message["step_cache"]["hits"] == [True, True]
    assert isinstance(error, Impossible) and "none such" in error.message


def test_presets_are_read_from_beside_the_checkpoint(served, tmp_path):
    every_third = {"policy": "deep_cache", "parameters": {"interval": 3}, "end_timestep": 800}
    every_second = {"policy": "deep_cache", "parameters": {"interval": 2}}
    presets = {"samplers": {"euler": {"fast": every_third}, "any": {"fast": every_second}}}
    path = tmp_path / "models" / "checkpoints" / "tiny.step_cache.json"
    path.write_text(json.dumps(presets), encoding="utf-8")
    unet = served()

    def hits(session, **preset):
        answers = [unet.answer(request(1, step, session=session, preset="fast", **preset)) for step in range(4)]
        return [all(message["step_cache"]["hits"]) for ((message, _),) in answers]

    assert hits("euler", sampler="euler") == [False, True, True, False]  # the fourth is below timestep 800
    assert hits("unknown", sampler="lms") == hits("unsaid") == [False, True, False, True]
    (error,) = unet.answer(request(1, 0, session="q", preset="quality", sampler="euler"))
    assert isinstance(error, Impossible) and "quality" in error.message and "it has fast" in error.hint


def test_presets_that_make_no_sense_stop_the_model(served, tmp_path):
    path = tmp_path / "models" / "checkpoints" / "tiny.step_cache.json"
    path.write_text('{"samplers": {"euler": {"fast": {"policy": "deep_cache", "parameters": {"interval": -3}}}}}')
    (error,) = served().answer(request(1, 0))
    assert isinstance(error, Broken) and "interval" in error.message
