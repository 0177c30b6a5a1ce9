"""Pieces of workflows that several tests put together."""

from typing import Any

from tests.comfyui.comfyui import Graph, Output


def remote(g: Graph, checkpoint: str) -> tuple[Output, Output, Output]:
    same = dict.fromkeys(("unet", "clip", "vae"), "from checkpoint")
    router = g("LunaModelRouter", checkpoint=checkpoint, daemon_mode="force_daemon", **same)
    return router[0], router[1], router[2]


def local(g: Graph, checkpoint: str) -> tuple[Output, Output, Output]:
    loader = g("CheckpointLoaderSimple", ckpt_name=checkpoint)
    return loader[0], loader[1], loader[2]


def encode(g: Graph, clip: Output, positive: str = "a red fox", negative: str = "blurry") -> tuple[Output, Output]:
    return g("CLIPTextEncode", clip=clip, text=positive), g("CLIPTextEncode", clip=clip, text=negative)


def empty(g: Graph, width: int = 128, height: int = 96, batch: int = 1) -> Output:
    return g("EmptyLatentImage", width=width, height=height, batch_size=batch)


def sample(g: Graph, model: Output, conds: tuple[Output, Output], latent: Output, **changes) -> Output:
    settings = {"seed": 5, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    positive, negative = conds
    return g("KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **(settings | changes))


def gateway(g: Graph, model: Output, clip: Output, vae: Output, positive: str, **changes: Any) -> Output:
    inputs = {
        "negative": "blurry",
        "width": 128,
        "height": 96,
        "batch_size": 1,
        "seed": 5,
        "steps": 3,
        "cfg": 4.0,
        "denoise": 1.0,
        "clip_skip": -1,
        "clip_skip_timing": "after_lora",
        "sampler_name": "euler",
        "scheduler": "normal",
        "fb_cache_enabled": False,
        "fb_cache_start_percent": 0.0,
        "fb_cache_end_percent": 1.0,
        "fb_cache_residual_threshold": 0.1,
        "fb_cache_max_consecutive_hits": -1,
        "fb_cache_preset": "none",
    }
    return g("LunaConfigGateway", model=model, clip=clip, vae=vae, positive=positive, **(inputs | changes))
