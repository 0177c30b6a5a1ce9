"""Luna Shared CLIP Encode: prompts to conditioning by a text encoder on the server, with no loader node."""

from typing import Any

import nodes

from comfy_client import settings
from comfy_client.nodes import choices
from comfy_client.proxies.served import served

_PROMPT = {"multiline": True, "dynamicPrompts": True}


def _clip_input() -> tuple:
    return (choices.files("clip"), {"tooltip": "A file whose text encoders the server has."})


def _size(default: int, lowest: int, tooltip: str) -> tuple:
    return ("INT", {"default": default, "min": lowest, "max": 4096, "step": 8, "tooltip": tooltip})


def _clip(checkpoint: str) -> Any:
    return served(settings.server(), {"clip": checkpoint})["clip"]


class _Encode:
    CATEGORY = "Luna"
    FUNCTION = "encode"

    @classmethod
    def VALIDATE_INPUTS(cls, clip_model: str) -> bool:
        return True  # the list is of when the server was last seen; the run says what is wrong

    @classmethod
    def IS_CHANGED(cls, clip_model: str, **_others: Any) -> str:
        return choices.identity({"clip": clip_model})


class LunaSharedCLIPEncode(_Encode):
    TITLE = "Luna Shared CLIP Encode"
    DESCRIPTION = "One prompt to conditioning on the server."
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = ("STRING", _PROMPT | {"tooltip": "The prompt, with ComfyUI's (weights:1.2) and embedding:names."})
        return {"required": {"clip_model": _clip_input(), "text": text}}

    def encode(self, clip_model: str, text: str):
        return nodes.CLIPTextEncode().encode(_clip(clip_model), text)


class LunaSharedCLIPEncodeDual(_Encode):
    TITLE = "Luna Shared CLIP Encode Dual"
    DESCRIPTION = "Positive and negative prompt to conditioning on the server."
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "clip_model": _clip_input(),
                "positive": ("STRING", _PROMPT | {"tooltip": "What the picture should show."}),
                "negative": ("STRING", _PROMPT | {"tooltip": "What it should not."}),
            }
        }

    def encode(self, clip_model: str, positive: str, negative: str):
        clip = _clip(clip_model)
        return tuple(nodes.CLIPTextEncode().encode(clip, text)[0] for text in (positive, negative))


class LunaSharedCLIPEncodeSDXL(_Encode):
    TITLE = "Luna Shared CLIP Encode SDXL"
    DESCRIPTION = "Both prompts with SDXL's size conditioning, on the server."
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = LunaSharedCLIPEncodeDual.INPUT_TYPES()["required"] | {
            "width": _size(1024, 512, "Width of the picture SDXL should believe it was trained on."),
            "height": _size(1024, 512, "Its height."),
            "crop_w": _size(0, 0, "How much of its left was cropped away."),
            "crop_h": _size(0, 0, "How much of its top was cropped away."),
            "target_w": _size(1024, 512, "Width of the picture to make."),
            "target_h": _size(1024, 512, "Height of the picture to make."),
        }
        return {"required": inputs}

    def encode(self, clip_model: str, positive: str, negative: str, **sizes: int):
        clip = _clip(clip_model)
        values = {
            "width": sizes["width"],
            "height": sizes["height"],
            "crop_w": sizes["crop_w"],
            "crop_h": sizes["crop_h"],
            "target_width": sizes["target_w"],
            "target_height": sizes["target_h"],
        }
        return tuple(
            clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict=values) for text in (positive, negative)
        )


NODES = {
    "LunaSharedCLIPEncode": LunaSharedCLIPEncode,
    "LunaSharedCLIPEncodeDual": LunaSharedCLIPEncodeDual,
    "LunaSharedCLIPEncodeSDXL": LunaSharedCLIPEncodeSDXL,
}
