"""What TorchServe hands over as one batch: step caching beside other clients' rows, LoRAs and faults."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from handlers.unet_forward import UNetHandler
from protocol.blob import pack, unpack
from protocol.messages import LoraUse, StepCache, UNetForward
from tests import checkpoints

SHAPE = checkpoints.SHAPES["tiny_sd15"].unet


class Context(SimpleNamespace):
    """What a handler uses of TorchServe's context."""

    def __init__(self, home, **settings):
        settings = {"role": "unet", "home": str(home), "family": "sd15", "checkpoint": "tiny.safetensors", **settings}
        super().__init__(model_name="tiny.unet", system_properties={}, model_yaml_config={"handler": settings})
        self.counted, self.metrics = {}, self

    def add_counter(self, name, value):
        self.counted[name] = self.counted.get(name, 0) + value

    def set_response_content_type(self, index, kind):
        pass

    def set_response_header(self, index, name, value):
        pass

    def set_response_status(self, status, phrase, index):
        self.status = status


@pytest.fixture
def context(home, tmp_path):
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
    return lambda **settings: Context(tmp_path, **settings)


def started(context):
    handler = UNetHandler()
    handler.initialize(context)
    assert handler.failure is None
    return handler


def request(seed, step, lora=None, session=None, **settings):
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(2, 77, SHAPE.context, generator=generator)
    cache = session and StepCache(session=session, step=step, conds=["uncond", "cond"], **settings)
    message = UNetForward(lora=[LoraUse(name=f"{lora}.safetensors")] if lora else [], step_cache=cache)
    x = x.repeat(2, 1, 1, 1) * (1 - step / 20)
    return {"body": pack(message, {"x": x, "timesteps": torch.full((2,), 900.0 - 50 * step), "context": text})}


EAGER = {"parameters": {"residual_threshold": 10}}


@pytest.mark.parametrize("overlay_mb", [64, 0], ids=["merged", "beside the weights"])
def test_rows_that_leave_a_batch_never_shift_anothers_loras(context, overlay_mb):
    rows = [{"seed": 1, "lora": "left", "session": "a", **EAGER}, {"seed": 2, "lora": "right"}, {"seed": 3}]
    settings = context(lora_overlay_mb=overlay_mb)
    alone, together = started(settings), started(settings)
    for step in range(3):
        expected = [unpack(alone.handle([request(step=step, **row)], settings)[0]) for row in rows]
        got = [unpack(one) for one in together.handle([request(step=step, **row) for row in rows], settings)]
        for (message, tensors), (message_alone, tensors_alone) in zip(got, expected, strict=True):
            assert torch.allclose(tensors["out"], tensors_alone["out"], atol=1e-4)
            assert message["unmerged"] == message_alone["unmerged"]
        assert got[0][0]["step_cache"]["hits"] == [step > 0] * 2
        assert got[1][0]["step_cache"] is None


def test_a_fault_in_a_batch_costs_no_one_elses_hit(context):
    settings = context()
    handler = started(settings)
    handler.handle([request(1, 0, session="a", **EAGER)], settings)
    good, bad = handler.handle(
        [request(1, 1, session="a", **EAGER), request(2, 1, session="b", policy="none such")], settings
    )
    assert unpack(good)[0]["step_cache"]["hits"] == [True, True]
    assert b"none such" in bad and settings.status == 422
    assert settings.counted["StepCacheHits"] == 2 and settings.counted["StepCacheMisses"] == 2


def test_presets_are_read_from_beside_the_checkpoint(context, tmp_path):
    every_third = {"policy": "deep_cache", "parameters": {"interval": 3}, "end_timestep": 800}
    every_second = {"policy": "deep_cache", "parameters": {"interval": 2}}
    presets = {"samplers": {"euler": {"fast": every_third}, "any": {"fast": every_second}}}
    path = tmp_path / "models" / "checkpoints" / "tiny.step_cache.json"
    path.write_text(json.dumps(presets), encoding="utf-8")
    settings = context()
    handler = started(settings)

    def hits(session, **preset):
        replies = [
            handler.handle([request(1, s, session=session, preset="fast", **preset)], settings) for s in range(4)
        ]
        return [all(unpack(reply)[0]["step_cache"]["hits"]) for (reply,) in replies]

    assert hits("euler", sampler="euler") == [False, True, True, False]  # the fourth is below timestep 800
    assert hits("unknown", sampler="lms") == hits("unsaid") == [False, True, False, True]
    (reply,) = handler.handle([request(1, 0, session="q", preset="quality", sampler="euler")], settings)
    assert b"quality" in reply and b"it has fast" in reply


def test_presets_that_make_no_sense_stop_the_model(context, tmp_path):
    path = tmp_path / "models" / "checkpoints" / "tiny.step_cache.json"
    path.write_text('{"samplers": {"euler": {"fast": {"policy": "deep_cache", "parameters": {"interval": -3}}}}}')
    handler, settings = UNetHandler(), context()
    handler.initialize(settings)
    (reply,) = handler.handle([request(1, 0)], settings)
    assert b"interval" in reply and settings.status == 503
