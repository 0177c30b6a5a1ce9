"""The checkpoint and the LoRAs that are shipped: small enough, and good enough to see what a change does."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from scripts.sampling import LATENT_SCALE
from training import shapes
from training.autoencoder import target_latents
from training.evaluate import held_out, shares
from training.painter import CHECKPOINT, LORAS, Miniature

LORA_FILES = sorted(LORAS.glob("*.safetensors"))


@pytest.fixture(scope="module")
def miniature():
    return Miniature()


def test_the_checkpoint_is_small():
    assert CHECKPOINT.stat().st_size <= 20e6


def test_every_tensor_is_fp16_and_finite():
    for path in (CHECKPOINT, *LORA_FILES):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.float16, name
                assert bool(tensor.isfinite().all()), name


def test_a_step_cache_has_something_to_skip(miniature):
    layout = miniature.unet.layout
    assert len(layout.channels) >= 3
    assert all(depth > 0 for level in layout.input_depths + layout.output_depths for depth in level)


def test_the_autoencoder_goes_there_and_back(miniature):
    rng = np.random.default_rng(9)
    drawn = np.stack([shapes.draw(shapes.random_scene(rng)) for _ in range(8)])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
    with torch.inference_mode():
        latent = miniature.vae.encode(images)
        restored = miniature.vae.decode(latent).clamp(-1, 1)
    assert (restored - images).abs().mean().item() / 2 < 0.025
    assert (latent * LATENT_SCALE["sd15"] - target_latents(images)).abs().mean().item() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_it_paints_what_captions_say(miniature, sampler):
    found = shares(miniature, held_out(40), steps=20, sampler=sampler)
    assert found["background"] >= 0.95
    assert found["colour"] >= 0.95
    assert found["shape"] >= 0.8


def test_the_loras_are_small_and_of_several_kinds():
    assert len(LORA_FILES) >= 3
    kinds = set()
    for path in LORA_FILES:
        assert path.stat().st_size <= 1e6, path.name
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(name).get_shape())
                kinds.add((name.rpartition(".lora_down")[1] or name.rpartition(".hada")[1], shape[2:] == (3, 3)))
    assert (".lora_down", True) in kinds
    assert (".hada", False) in kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in LORA_FILES])
def test_a_lora_shows_by_its_strength_and_leaves_nothing_behind(miniature, name):
    captions = ["a large red circle on a white background", "a large yellow star on a blue background"]
    plain, half, full = (miniature.pictures(captions, steps=12, lora={name: strength}) for strength in (0, 0.5, 1))
    assert np.abs(full - plain).mean() > 0.02
    assert np.abs(half - plain).mean() > 0.002
    assert np.abs(half - plain).mean() < np.abs(full - plain).mean()
    assert np.array_equal(miniature.pictures(captions, steps=12), plain)
