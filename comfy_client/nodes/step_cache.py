"""Luna First Block Cache: lets the server reuse work of earlier steps."""

from typing import Any

from comfy_client.proxies.model import RemoteModelPatcher
from comfy_client.proxies.step_cache import PRESETS, STEP_CACHE_KEY, StepCacheSettings

INPUTS: dict[str, Any] = {
    "start_percent": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.001,
            "tooltip": "From which part of the run on steps may be reused.",
        },
    ),
    "end_percent": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.001,
            "tooltip": "Up to which part of the run steps may be reused.",
        },
    ),
    "residual_threshold": (
        "FLOAT",
        {
            "default": 0.1,
            "min": 0.0,
            "max": 10.0,
            "step": 0.001,
            "tooltip": "A step is reused when the first block's residual changed by less than this share. "
            "Higher is faster and less true to the uncached picture; 0 reuses nothing.",
        },
    ),
    "max_consecutive_hits": (
        "INT",
        {"default": -1, "min": -1, "max": 100, "tooltip": "How many steps in a row may be reused; -1 for no bound."},
    ),
    "preset": (
        list(PRESETS),
        {"default": "none", "tooltip": "A policy tuned for the model on the server, instead of the four values above."},
    ),
}


def cached(model: Any, settings: StepCacheSettings) -> Any:
    """A clone of a remote MODEL whose forwards ask for the step cache.

    Raises:
        ValueError: the MODEL is a local one.
    """
    if not isinstance(model, RemoteModelPatcher):
        raise ValueError(
            "The first block cache runs on the server, and this MODEL is local. "
            "Take the MODEL from Luna Model Router, or remove the cache."
        )
    clone = model.clone()
    clone.model_options["transformer_options"][STEP_CACHE_KEY] = settings
    return clone


class LunaFirstBlockCache:
    TITLE = "Luna First Block Cache"
    CATEGORY = "Luna"
    DESCRIPTION = "Skips most of a step when its first block says that little changed. State per run, on the server."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = ("MODEL", {"tooltip": "A MODEL of Luna Model Router."})
        enabled = ("BOOLEAN", {"default": True, "tooltip": "Off passes the MODEL on unchanged."})
        return {"required": {"model": model, "enabled": enabled, **INPUTS}}

    def apply(self, model: Any, enabled: bool, **switches: Any):
        return (cached(model, StepCacheSettings(**switches)) if enabled else model,)


NODES = {"LunaFirstBlockCache": LunaFirstBlockCache}
