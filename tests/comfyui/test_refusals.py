"""Nodes that need the UNet's blocks or the weights say so by name, instead of silently giving the unpatched picture."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.comfyui import ComfyUI, Graph, Output, RunFailed
from tests.comfyui.workflows import empty, encode, remote, sample

pytestmark = pytest.mark.slow

Patch = Callable[[Graph, Output], Output]


def _node(class_type: str, **inputs) -> Patch:
    return lambda g, model: g(class_type, model=model, **inputs)


DEEP_SHRINK = {
    "block_number": 1,
    "downscale_factor": 2.0,
    "start_percent": 0.0,
    "end_percent": 0.9,
    "downscale_after_skip": True,
    "downscale_method": "bicubic",
    "upscale_method": "bicubic",
}
PATCHES: dict[str, tuple[Patch, str]] = {
    "HyperTile": (
        _node("HyperTile", tile_size=256, swap_size=2, max_depth=0, scale_depth=False),
        "HyperTile patches the UNet's blocks (attn1_patch)",
    ),
    "ToMe": (_node("TomePatchModel", ratio=0.3), "TomePatchModel (ToMe) patches the UNet's blocks (attn1_patch)"),
    "DeepShrink": (
        _node("PatchModelAddDownscale", **DEEP_SHRINK),
        "PatchModelAddDownscale (Kohya Deep Shrink) patches the UNet's blocks",
    ),
    "PAG": (
        _node("PerturbedAttentionGuidance", scale=3.0),
        "PerturbedAttentionGuidance (PAG) replaces parts of the UNet's blocks (attn1)",
    ),
    "SAG": (
        _node("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
        "Self-Attention Guidance (SAG) replaces parts of the UNet's blocks (attn1)",
    ),
    "ModelMergeSimple": (
        lambda g, model: g("ModelMergeSimple", model1=model, model2=model, ratio=0.5),
        "A ModelMerge or CLIPMerge node reads the weights",
    ),
    "ModelComputeDtype": (_node("ModelComputeDtype", dtype="fp32"), "ModelComputeDtype sets what the weights"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_patches_of_the_blocks_raise_their_own_message(name: str, comfyui: ComfyUI) -> None:
    patch, told = PATCHES[name]
    g = Graph()
    model, clip, _ = remote(g, "sd15.safetensors")
    g.save(sample(g, patch(g, model), encode(g, clip), empty(g)), "never")
    with pytest.raises(RunFailed) as failure:
        comfyui.run(g)
    assert told in failure.value.message
    assert "daemon_mode force_local" in failure.value.message


@pytest.mark.parametrize(
    ("save", "told"),
    [
        (lambda g, parts: g("ModelSave", model=parts[0], filename_prefix="x"), "ModelSave"),
        (
            lambda g, parts: g("CheckpointSave", model=parts[0], clip=parts[1], vae=parts[2], filename_prefix="x"),
            "CheckpointSave",
        ),
        (lambda g, parts: g("CLIPSave", clip=parts[1], filename_prefix="x"), "CLIPSave"),
        (lambda g, parts: g("VAESave", vae=parts[2], filename_prefix="x"), "VAESave"),
    ],
    ids=("ModelSave", "CheckpointSave", "CLIPSave", "VAESave"),
)
def test_saving_weights_that_are_not_here_raises(save, told: str, comfyui: ComfyUI) -> None:
    g = Graph()
    save(g, remote(g, "sd15.safetensors"))
    with pytest.raises(RunFailed, match=told):
        comfyui.run(g)


def test_control_lora_raises(comfyui: ComfyUI, models) -> None:
    weights = {"lora_controlnet": torch.zeros(1), "input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)}
    save_file(weights, models / "controlnet" / "control_lora.safetensors")
    g = Graph()
    model, clip, _ = remote(g, "sd15.safetensors")
    positive, negative = encode(g, clip)
    controlled = g(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=g("ControlNetLoader", control_net_name="control_lora.safetensors"),
        image=g("LoadImage", image="picture.png")[0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    g.save(sample(g, model, (controlled[0], controlled[1]), empty(g)), "never")
    with pytest.raises(RunFailed, match="Control-LoRA"):
        comfyui.run(g)
