"""What the engine serves: one file a role. Each is imported when it is first wanted, with what its models need."""

from importlib import import_module

from engine.role import Role

_CLASSES = {"unet": "UNetRole", "clip": "ClipRole", "vae": "VaeRole"}


def role_class(role: str) -> type[Role]:
    """The class of a role: "unet", "clip" or "vae"."""
    return getattr(import_module(f"{__name__}.{role}"), _CLASSES[role])
