"""Workflows on a remote checkpoint and on the same one loaded by ComfyUI itself give identical latents.

Latents are saved as they are, and pictures encoded again would only hide differences, so a decoded picture is compared
after `VAEEncode` by the same local VAE: a difference of one bit in a pixel shows there too.
"""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch

from tests.comfyui.comfyui import ComfyUI, Graph, Output
from tests.comfyui.workflows import empty, encode, local, remote, sample

SAMPLERS = (
    "euler",
    "dpmpp_2m",
    "ddim",
    "uni_pc",
    "lcm",
    "euler_ancestral",
    "dpmpp_sde",
    "heun",
    "euler_cfg_pp",
    "res_multistep",
)
LONG_PROMPT = ", ".join(f"a (red:1.{i % 9 + 1}) fox number {i}" for i in range(26))  # three sections of 77 tokens

Loader = Callable[[Graph, str], tuple[Output, Output, Output]]
Workflow = Callable[[Graph, Loader], None]


def save_picture(g: Graph, picture: Output, name: str) -> None:
    """Keep a picture as the latent that a small VAE of ComfyUI's own makes of it."""
    g.save(g("VAEEncode", pixels=picture, vae=local(g, "sd15.safetensors")[2]), name)


def text_to_image_sd15(g: Graph, load: Loader) -> None:
    model, clip, vae = load(g, "sd15.safetensors")
    latent = sample(g, model, encode(g, clip, "a (red:1.3) fox"), empty(g))
    g.save(latent, "latent")
    save_picture(g, g("VAEDecode", samples=latent, vae=vae), "picture")


def text_to_image_sdxl(g: Graph, load: Loader) -> None:
    model, clip, vae = load(g, "sdxl.safetensors")
    sizes = {"width": 1024, "height": 768, "crop_w": 8, "crop_h": 0, "target_width": 512, "target_height": 512}
    positive = g("CLIPTextEncodeSDXL", clip=clip, text_g="a fox", text_l="red (fur:1.2)", **sizes)
    lora = g("LoraLoader", model=model, clip=clip, lora_name="xl.safetensors", strength_model=0.8, strength_clip=0.6)
    patched = g("CLIPTextEncode", clip=lora[1], text="a fox")
    negative = g("CLIPTextEncode", clip=clip, text="")
    latent = sample(g, model, (positive, negative), empty(g))
    g.save(latent, "latent")
    g.save(sample(g, lora[0], (patched, negative), empty(g)), "lora")
    save_picture(g, g("VAEDecode", samples=latent, vae=vae), "picture")


def image_to_image(g: Graph, load: Loader) -> None:
    model, clip, vae = load(g, "sd15.safetensors")
    picture = g("LoadImage", image="picture.png")
    encoded = g("VAEEncode", pixels=picture[0], vae=vae)
    g.save(encoded, "encoded")
    g.save(sample(g, model, encode(g, clip), encoded, denoise=0.6), "latent")


def inpaint(g: Graph, load: Loader) -> None:
    model, clip, vae = load(g, "sd15.safetensors")
    picture = g("LoadImage", image="picture.png")
    masked = g("VAEEncodeForInpaint", pixels=picture[0], vae=vae, mask=picture[1], grow_mask_by=6)
    g.save(sample(g, model, encode(g, clip), masked), "latent_mask")
    nine, clip, vae = load(g, "sd15_inpaint.safetensors")
    positive, negative = encode(g, clip)
    conditioned = g(
        "InpaintModelConditioning",
        positive=positive,
        negative=negative,
        vae=vae,
        pixels=picture[0],
        mask=picture[1],
        noise_mask=True,
    )
    g.save(sample(g, nine, (conditioned[0], conditioned[1]), conditioned[2]), "latent_nine_channels")


def two_loras(g: Graph, load: Loader) -> None:
    model, clip, _ = load(g, "sd15.safetensors")
    first = g("LoraLoader", model=model, clip=clip, lora_name="a.safetensors", strength_model=0.9, strength_clip=0.7)
    second = g(
        "LoraLoader", model=first[0], clip=first[1], lora_name="b.safetensors", strength_model=-0.4, strength_clip=0.5
    )
    g.save(sample(g, second[0], encode(g, second[1]), empty(g)), "stacked")
    # The unpatched model after the patched one: nothing may be left of it.
    g.save(sample(g, model, encode(g, clip), empty(g)), "plain")


def float8(g: Graph, load: Loader) -> None:
    model, clip, vae = load(g, "sd15_float8.safetensors")
    g.save(sample(g, model, encode(g, clip), empty(g)), "plain")
    lora = g("LoraLoader", model=model, clip=clip, lora_name="a.safetensors", strength_model=0.9, strength_clip=0.7)
    latent = sample(g, lora[0], encode(g, lora[1]), empty(g))
    g.save(latent, "lora")
    save_picture(g, g("VAEDecode", samples=latent, vae=vae), "picture")


def lora_hooks(g: Graph, load: Loader) -> None:
    model, clip, _ = load(g, "sd15.safetensors")
    keyframes = g("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    keyframes = g("CreateHookKeyframe", strength_mult=0.3, start_percent=0.5, prev_hook_kf=keyframes)
    hooks = g("CreateHookLora", lora_name="a.safetensors", strength_model=0.8, strength_clip=0.8)
    hooks = g("SetHookKeyframes", hooks=hooks, hook_kf=keyframes)
    hooked = g("SetClipHooks", clip=clip, hooks=hooks, apply_to_conds=True, schedule_clip=True)
    positive = g("CLIPTextEncode", clip=hooked, text="a red fox")
    negative = g("CLIPTextEncode", clip=clip, text="blurry")
    g.save(sample(g, model, (positive, negative), empty(g), steps=4), "latent")


def clip_skip(g: Graph, load: Loader) -> None:
    model, clip, _ = load(g, "sd15.safetensors")
    skipped = g("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-3)
    g.save(sample(g, model, encode(g, skipped), empty(g)), "latent")


def textual_inversion(g: Graph, load: Loader) -> None:
    model, clip, _ = load(g, "sd15.safetensors")
    g.save(sample(g, model, encode(g, clip, "a (embedding:thing:1.2) on grass"), empty(g)), "latent")


def three_sections(g: Graph, load: Loader) -> None:
    model, clip, _ = load(g, "sd15.safetensors")
    g.save(sample(g, model, encode(g, clip, LONG_PROMPT), empty(g)), "latent")


def controlnet(g: Graph, load: Loader) -> None:
    model, clip, vae = load(g, "sd15.safetensors")
    positive, negative = encode(g, clip)
    controlled = g(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=g("ControlNetLoader", control_net_name="net.safetensors"),
        image=g("LoadImage", image="picture.png")[0],
        strength=0.8,
        start_percent=0.0,
        end_percent=0.8,
        vae=vae,
    )
    g.save(sample(g, model, (controlled[0], controlled[1]), empty(g)), "latent")


def free_u(g: Graph, load: Loader) -> None:
    model, clip, _ = load(g, "sd15_wide.safetensors")
    conds = encode(g, clip)
    settings = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
    first = g("FreeU", model=model, **settings)
    for name, patched in {"plain": model, "v1": first, "v2": g("FreeU_V2", model=model, **settings)}.items():
        g.save(sample(g, patched, conds, empty(g)), name)
    g.save(sample(g, g("FreeU_V2", model=first, **settings), conds, empty(g, 72, 104)), "both")


def tiled_vae(g: Graph, load: Loader) -> None:
    _, _, vae = load(g, "sd15.safetensors")
    picture = g(
        "ImageScale",
        image=g("LoadImage", image="picture.png")[0],
        upscale_method="bicubic",
        width=320,
        height=256,
        crop="disabled",
    )
    encoded = g(
        "VAEEncodeTiled", pixels=picture, vae=vae, tile_size=128, overlap=32, temporal_size=64, temporal_overlap=8
    )
    g.save(encoded, "encoded")
    decoded = g(
        "VAEDecodeTiled", samples=encoded, vae=vae, tile_size=128, overlap=32, temporal_size=64, temporal_overlap=8
    )
    save_picture(g, decoded, "picture")


def batch_of_three(g: Graph, load: Loader) -> None:
    model, clip, vae = load(g, "sd15.safetensors")
    latent = sample(g, model, encode(g, clip), empty(g, 72, 104, batch=3))
    g.save(latent, "latent")
    save_picture(g, g("VAEDecode", samples=latent, vae=vae), "picture")


def ten_samplers(g: Graph, load: Loader) -> None:
    model, clip, _ = load(g, "sd15.safetensors")
    conds = encode(g, clip)
    for sampler in SAMPLERS:
        scheduler = "karras" if sampler.startswith("dpm") else "normal"
        g.save(sample(g, model, conds, empty(g, 64, 64), sampler_name=sampler, scheduler=scheduler), sampler)


WORKFLOWS: tuple[Workflow, ...] = (
    text_to_image_sd15,
    image_to_image,
    inpaint,
    two_loras,
    float8,
    lora_hooks,
    clip_skip,
    textual_inversion,
    three_sections,
    controlnet,
    free_u,
    tiled_vae,
    batch_of_three,
    ten_samplers,
    text_to_image_sdxl,
)


@pytest.mark.slow
@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.__name__)
def test_remote_and_local_latents_are_identical(workflow: Workflow, comfyui: ComfyUI, room: None, request) -> None:
    if workflow is text_to_image_sdxl:
        request.getfixturevalue("sdxl")
    saved = []
    for load in (local, remote):
        graph = Graph()
        workflow(graph, load)
        saved.append(comfyui.run(graph).latents)
    theirs, ours = saved
    assert theirs.keys() == ours.keys() and theirs
    different = {
        name: deviation(ours[name], theirs[name]) for name in theirs if not torch.equal(ours[name], theirs[name])
    }
    assert not different
    assert all(latent.isfinite().all() and latent.std() > 0 for latent in theirs.values())
    if workflow is not ten_samplers:  # where ddim is euler
        assert not any(torch.equal(one, other) for one, other in combinations(theirs.values(), 2))


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """How far apart, as a ratio of the largest value to the root mean square difference."""
    error = (ours.double() - theirs.double()).square().mean().sqrt()
    return f"{20 * torch.log10(theirs.abs().max() / error):.0f} dB"
