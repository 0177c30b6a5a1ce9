"""Luna Config Gateway: one node for size, sampling, prompts, LoRAs and step cache, whatever runs where."""

from typing import Any

import nodes
from comfy.samplers import KSampler

from comfy_client import loras, settings
from comfy_client.nodes import choices
from comfy_client.nodes.router import CHECKPOINT_ATTACHMENT
from comfy_client.nodes.step_cache import INPUTS as CACHE_INPUTS
from comfy_client.nodes.step_cache import cached
from comfy_client.notice import warn
from comfy_client.prompt_loras import LoraChoice, split
from comfy_client.proxies.step_cache import StepCacheSettings

_MAX_SEED = 0xFFFFFFFFFFFFFFFF


class LunaConfigGateway:
    TITLE = "Luna Config Gateway"
    CATEGORY = "Luna"
    DESCRIPTION = (
        "Everything a KSampler wants, from one node. LoRAs come from <lora:name:weight:clip_weight> in the prompts and "
        "from a stack; MODEL and CLIP may each be remote or local."
    )
    RETURN_TYPES = (
        "MODEL",
        "CLIP",
        "VAE",
        "CONDITIONING",
        "CONDITIONING",
        "LATENT",
        "INT",
        "INT",
        "FLOAT",
        "FLOAT",
        KSampler.SAMPLERS,
        KSampler.SCHEDULERS,
        "METADATA",
    )
    RETURN_NAMES = (
        "model",
        "clip",
        "vae",
        "positive",
        "negative",
        "latent",
        "seed",
        "steps",
        "cfg",
        "denoise",
        "sampler_name",
        "scheduler",
        "metadata",
    )
    FUNCTION = "configure"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"default": 1024, "min": 64, "max": 8192, "step": 8}
        prompt = {"multiline": True, "dynamicPrompts": True}
        cache = {f"fb_cache_{name}": spec for name, spec in CACHE_INPUTS.items()}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Remote or local."}),
                "clip": ("CLIP", {"tooltip": "Remote or local."}),
                "vae": ("VAE", {"tooltip": "Passed on."}),
                "positive": (
                    "STRING",
                    prompt | {"tooltip": "What the picture should show; <lora:name:weight> adds a LoRA."},
                ),
                "negative": ("STRING", prompt | {"tooltip": "What it should not show."}),
                "width": ("INT", side | {"tooltip": "Width of the picture in pixels."}),
                "height": ("INT", side | {"tooltip": "Height of the picture in pixels."}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "Pictures made at once."}),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": _MAX_SEED,
                        "control_after_generate": True,
                        "tooltip": "Of the noise.",
                    },
                ),
                "steps": ("INT", {"default": 25, "min": 1, "max": 10000, "tooltip": "Steps of the sampler."}),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 7.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "How strictly to follow the prompt.",
                    },
                ),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "Below 1: part of a given latent stays.",
                    },
                ),
                "clip_skip": (
                    "INT",
                    {"default": -2, "min": -24, "max": -1, "tooltip": "The text encoders' layer to use, from the end."},
                ),
                "clip_skip_timing": (
                    ["after_lora", "before_lora"],
                    {"tooltip": "When the layer is chosen. Both give the same conditioning; kept for older workflows."},
                ),
                "sampler_name": (KSampler.SAMPLERS, {"default": "dpmpp_2m", "tooltip": "The sampler."}),
                "scheduler": (
                    KSampler.SCHEDULERS,
                    {"default": "karras", "tooltip": "How the noise levels are spaced."},
                ),
                "fb_cache_enabled": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Let the server reuse work of earlier steps; needs a remote MODEL."},
                ),
                **cache,
            },
            "optional": {
                "lora_stack": ("LORA_STACK", {"tooltip": "LoRAs added before those of the prompts."}),
                "latent": ("LATENT", {"tooltip": "Start from this instead of an empty latent."}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, positive: str | None, negative: str | None, **others: Any) -> str:
        # ComfyUI gives None for what another node brings, and so for the LoRAs that it names.
        if positive is None or negative is None or "lora_stack" in others:
            return choices.lora_identity(None)
        return choices.lora_identity(lora.name for prompt in (positive, negative) for lora in split(prompt)[1])

    def configure(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        positive: str,
        negative: str,
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        steps: int,
        cfg: float,
        denoise: float,
        clip_skip: int,
        clip_skip_timing: str,
        sampler_name: str,
        scheduler: str,
        fb_cache_enabled: bool,
        lora_stack: list[tuple[str, float, float]] | None = None,
        latent: dict[str, Any] | None = None,
        **cache: Any,
    ):
        positive_clean, from_positive = split(positive)
        negative_clean, from_negative = split(negative)
        chosen = [*(LoraChoice(*entry) for entry in lora_stack or []), *from_positive, *from_negative]
        for lora in chosen:
            if lora.ignored:
                warn(
                    f"<lora:{lora.name}...> is applied without {', '.join(lora.ignored)}, which LunaServe does not know"
                )
        if clip_skip_timing == "before_lora":
            clip = _skipped(clip, clip_skip)
        name = model.get_attachment(CHECKPOINT_ATTACHMENT) or ""
        if chosen:
            model, clip = loras.apply(model, clip, chosen, settings.server())
        if clip_skip_timing == "after_lora":
            clip = _skipped(clip, clip_skip)
        switches = {key.removeprefix("fb_cache_"): value for key, value in cache.items()}
        step_cache = StepCacheSettings(sampler=sampler_name, **switches)
        if fb_cache_enabled:
            model = cached(model, step_cache)
        encoder = nodes.CLIPTextEncode()
        if latent is None:
            latent = nodes.EmptyLatentImage().generate(width, height, batch_size)[0]
        metadata = {
            "model": name,
            "model_name": name.rpartition("/")[2].removesuffix(".safetensors"),
            "positive": positive,
            "positive_clean": positive_clean,
            "negative": negative,
            "negative_clean": negative_clean,
            "width": width,
            "height": height,
            "batch_size": batch_size,
            "seed": seed,
            "steps": steps,
            "cfg": cfg,
            "denoise": denoise,
            "clip_skip": clip_skip,
            "sampler": sampler_name,
            "sampler_name": sampler_name,
            "scheduler": scheduler,
            "loras": [
                {"name": lora.name, "weight": lora.strength, "clip_weight": lora.strength_clip} for lora in chosen
            ],
            "lora_count": len(chosen),
            "fb_cache_enabled": fb_cache_enabled,
            "fb_cache_range": [step_cache.start_percent, step_cache.end_percent] if fb_cache_enabled else None,
        }
        return (
            model,
            clip,
            vae,
            encoder.encode(clip, positive_clean)[0],
            encoder.encode(clip, negative_clean)[0],
            latent,
            seed,
            steps,
            cfg,
            denoise,
            sampler_name,
            scheduler,
            metadata,
        )


def _skipped(clip: Any, clip_skip: int) -> Any:
    return nodes.CLIPSetLastLayer().set_last_layer(clip, clip_skip)[0]


NODES = {"LunaConfigGateway": LunaConfigGateway}
