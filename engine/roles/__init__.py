"""What the engine serves: one file a role. Each is imported when it is first wanted, with what its models need.

Those here are our own, for SD1.5 and SDXL; `engine/comfyui/` has the same roles by the code of the user's ComfyUI.
"""

from importlib import import_module

from engine.role import Role

_CLASSES = {"unet": "UNetRole", "clip": "ClipRole", "vae": "VaeRole"}


def role_class(role: str, comfyui: bool = False) -> type[Role]:
    """The class of a role, "unet", "clip" or "vae"; `comfyui`: by the user's ComfyUI."""
    package = "engine.comfyui" if comfyui else __name__
    return getattr(import_module(f"{package}.{role}"), _CLASSES[role])
