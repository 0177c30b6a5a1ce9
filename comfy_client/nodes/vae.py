"""Luna Shared VAE Encode and Decode, whole or tiled, by a VAE on the server, with no loader node."""

from typing import Any

import nodes

from comfy_client import settings
from comfy_client.nodes import choices
from comfy_client.proxies.served import served


def _inputs(name: str, kind: str, tooltip: str) -> dict[str, Any]:
    return {
        "required": {
            "vae_model": (choices.files("vae"), {"tooltip": "A file whose VAE the server has."}),
            name: (kind, {"tooltip": tooltip}),
            "tiled": ("BOOLEAN", {"default": False, "tooltip": "Work tile by tile: less memory, slower."}),
            "tile_size": (
                "INT",
                {"default": 512, "min": 256, "max": 1024, "step": 64, "tooltip": "Side of a tile in pixels."},
            ),
            "overlap": (
                "INT",
                {"default": 64, "min": 0, "max": 256, "step": 8, "tooltip": "Pixels over which tiles are blended."},
            ),
        }
    }


def _vae(checkpoint: str) -> Any:
    return served(settings.server(), {"vae": checkpoint})["vae"]


class _Shared:
    CATEGORY = "Luna"
    FUNCTION = "run"

    @classmethod
    def VALIDATE_INPUTS(cls, vae_model: str) -> bool:
        return True  # the list is of when the server was last seen; the run says what is wrong

    @classmethod
    def IS_CHANGED(cls, vae_model: str, **_others: Any) -> str:
        return choices.identity({"vae": vae_model})


class LunaSharedVAEEncode(_Shared):
    TITLE = "Luna Shared VAE Encode"
    DESCRIPTION = "Pixels to latent on the server."
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _inputs("pixels", "IMAGE", "The picture to encode; sides are cut to multiples of 8.")

    def run(self, vae_model: str, pixels: Any, tiled: bool, tile_size: int, overlap: int):
        vae = _vae(vae_model)
        if tiled:
            return nodes.VAEEncodeTiled().encode(vae, pixels, tile_size, overlap)
        return nodes.VAEEncode().encode(vae, pixels)


class LunaSharedVAEDecode(_Shared):
    TITLE = "Luna Shared VAE Decode"
    DESCRIPTION = "Latent to pixels on the server."
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _inputs("samples", "LATENT", "The latent to decode.")

    def run(self, vae_model: str, samples: Any, tiled: bool, tile_size: int, overlap: int):
        vae = _vae(vae_model)
        if tiled:
            return nodes.VAEDecodeTiled().decode(vae, samples, tile_size, overlap)
        return nodes.VAEDecode().decode(vae, samples)


NODES = {"LunaSharedVAEEncode": LunaSharedVAEEncode, "LunaSharedVAEDecode": LunaSharedVAEDecode}
