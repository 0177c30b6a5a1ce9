import importlib
import json
from dataclasses import replace

import pytest
import torch

from engine.step_presets import Presets, Setting
from scripts.cache_quality import Comparison, compare, psnr, ssim
from scripts.sampling import SAMPLERS, Painter
from serving.torchserve import ROOT
from tests import checkpoints

PROMPTS = ["a red circle", "two blue squares"]
NEVER = Setting(policy="first_block", parameters={"residual_threshold": 0})
OFTEN = Setting(policy="deep_cache", parameters={"interval": 2})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("tuned") / "tiny.safetensors", "tiny_sd15")


@pytest.fixture(scope="module")
def painter(checkpoint):
    torch.set_num_threads(1)
    return Painter(checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def tune_step_cache():
    """The command's module, which finds its neighbours in its own folder only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("tune_step_cache")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_settings_painted_side_by_side_are_what_each_is_alone(painter, sampler):
    never, often = NEVER.resolved(), OFTEN.resolved()
    plain, cached, same = painter.paint(PROMPTS, sampler, 6, [None, often, never], side=64)
    (alone,) = painter.paint(PROMPTS, sampler, 6, [often], side=64)
    assert torch.equal(plain.pictures, same.pictures) and same.skipped == 0
    assert torch.equal(cached.pictures, alone.pictures) and cached.skipped == 0.5
    assert not torch.equal(cached.pictures, plain.pictures)


def test_a_comparison_sets_fewer_steps_at_the_same_cost_beside_a_setting(painter):
    references, (never, often) = compare(painter, PROMPTS, "euler", 8, [NEVER, OFTEN], side=64)
    assert torch.equal(never.pictures, references) and never.psnr.tolist() == [100, 100]
    assert often.fewer.steps == round(8 / often.speedup) < 8
    assert torch.equal(often.fewer.pictures, painter.paint(PROMPTS, "euler", often.fewer.steps, side=64)[0].pictures)
    assert often.figures["psnr_min"] == often.psnr.min().item() < often.figures["psnr_mean"]


def test_psnr_and_ssim_of_known_pictures():
    grey = torch.full((2, 3, 32, 32), 0.5)
    assert psnr(grey, grey).tolist() == [100, 100] and ssim(grey, grey).tolist() == pytest.approx([1, 1])
    assert psnr(grey + 0.1, grey).tolist() == pytest.approx([20, 20], abs=1e-3)
    # Of flat pictures only the luminance term is left: (2ab + c1) / (a^2 + b^2 + c1).
    assert ssim(grey + 0.1, grey)[0].item() == pytest.approx((0.6 + 1e-4) / (0.61 + 1e-4), abs=1e-3)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert ssim(1 - noise, noise).item() < 0 < ssim((noise + 0.05).clamp(0, 1), noise).item()


def comparison(setting, speedup, decibels, fewer_decibels, skipped=0.5):
    def made(values):
        pictures = torch.zeros(len(values), 3, 16, 16)
        return Comparison(setting, 30, speedup, skipped, torch.tensor(values), torch.ones(len(values)), pictures)

    return replace(made(decibels), fewer=made(fewer_decibels))


def test_presets_go_to_the_fastest_that_keeps_the_floor_everywhere_and_beats_fewer_steps(tune_step_cache):
    slow = comparison(NEVER, 1.5, [50.0, 45.0], [40.0, 38.0])
    fast = comparison(OFTEN, 2.5, [33.0, 27.0], [31.0, 26.0])
    chosen = tune_step_cache.choose([[slow, fast]])
    assert {preset: setting.policy for preset, setting in chosen.items()} == {
        "quality": "first_block",
        "balanced": "first_block",
        "fast": "deep_cache",
    }
    assert chosen["fast"].measured["speedup"] == 2.5 and chosen["fast"].measured["psnr_min"] == 27
    beaten = comparison(OFTEN, 2.5, [33.0, 27.0], [34.0, 26.0])
    assert tune_step_cache.choose([[slow, beaten]])["fast"].policy == "first_block"
    assert tune_step_cache.choose([[slow, fast], [slow, beaten]])["fast"].policy == "first_block"
    assert tune_step_cache.choose([[beaten]]) == {}
    # Where a setting reuses nothing it does no harm; it has to pay elsewhere.
    idle = comparison(OFTEN, 1.0, [100.0, 100.0], [100.0, 100.0], skipped=0.0)
    assert tune_step_cache.choose([[slow, fast], [slow, idle]])["fast"].measured["speedup"] == 1.75
    assert tune_step_cache.choose([[idle], [idle]]) == {}


def test_tuning_writes_presets_that_a_served_model_reads(tune_step_cache, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(tune_step_cache, "candidates", lambda: [OFTEN])
    monkeypatch.setattr(tune_step_cache, "FLOORS", {"fast": {"psnr_mean": 1.0}})
    monkeypatch.setattr(Comparison, "beats_fewer_steps", True)
    arguments = [str(checkpoint), "--side", "64", "--samplers", "euler", "--steps", "4", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["tune_step_cache.py", *arguments])
    assert tune_step_cache.main() == 0
    assert str(Presets.path(checkpoint)) in capsys.readouterr().out
    presets = Presets.load(checkpoint)
    assert (
        presets.samplers["euler"]["fast"].resolved() == OFTEN.resolved() == presets.samplers["any"]["fast"].resolved()
    )
    written = json.loads(Presets.path(checkpoint).read_text())
    assert written["samplers"]["euler"]["fast"]["measured"]["skipped"] == 0.5


def test_tuning_tells_what_is_wrong_with_the_model(tune_step_cache, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune_step_cache.py", "no_such.safetensors"])
    assert tune_step_cache.main() == 1
    assert "no_such.safetensors" in capsys.readouterr().err
