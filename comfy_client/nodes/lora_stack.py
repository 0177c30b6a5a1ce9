"""Luna LoRA Stack: up to five LoRAs with strengths, for Luna Config Gateway."""

from typing import Any

from comfy_client.nodes import choices

_NONE = "None"
_SLOTS = range(1, 6)


class LunaLoRAStack:
    TITLE = "Luna LoRA Stack"
    CATEGORY = "Luna"
    DESCRIPTION = "LoRAs of the server and of ComfyUI's own folder, added in this order."
    RETURN_TYPES = ("LORA_STACK",)
    FUNCTION = "stack"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [_NONE, *choices.loras()]
        required: dict[str, Any] = {}
        for slot in _SLOTS:
            strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}
            required |= {
                f"lora_{slot}": (names, {"tooltip": f"LoRA number {slot}, or None."}),
                f"strength_{slot}": ("FLOAT", strength | {"tooltip": "Its strength on the UNet."}),
                f"strength_clip_{slot}": ("FLOAT", strength | {"tooltip": "Its strength on the text encoders."}),
            }
        earlier = ("LORA_STACK", {"tooltip": "A stack that comes before this one."})
        return {"required": required, "optional": {"lora_stack": earlier}}

    @classmethod
    def VALIDATE_INPUTS(cls, **names: Any) -> bool:
        # The server's list is of when it was last seen; an unknown LoRA is refused when it is used.
        return True

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> str:
        names = [inputs[f"lora_{slot}"] for slot in _SLOTS]
        # ComfyUI gives None for what another node brings.
        return choices.lora_identity(None if None in names else [name for name in names if name != _NONE])

    def stack(self, lora_stack: list[tuple[str, float, float]] | None = None, **slots: Any):
        chosen = [
            (slots[f"lora_{slot}"], slots[f"strength_{slot}"], slots[f"strength_clip_{slot}"])
            for slot in _SLOTS
            if slots[f"lora_{slot}"] != _NONE
        ]
        return ([*(lora_stack or []), *chosen],)


NODES = {"LunaLoRAStack": LunaLoRAStack}
