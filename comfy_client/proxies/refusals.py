"""What cannot run on a model whose weights and blocks are on a server, refused by the name of the node that wants it.

A proxy that let such a patch pass would silently give the unpatched picture.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

# Classes whose node is called otherwise, and patches that stand outside their node's class.
_USUAL_NAMES = {
    "Gligen": "GLIGENTextBoxApply",
    "PatchModelAddDownscale": "PatchModelAddDownscale (Kohya Deep Shrink)",
    "PerturbedAttentionGuidance": "PerturbedAttentionGuidance (PAG)",
    "SelfAttentionGuidance": "Self-Attention Guidance (SAG)",
    "TomePatchModel": "TomePatchModel (ToMe)",
    "load_hypernetwork_patch": "HypernetworkLoader",
}


class NotRemote(RuntimeError):
    """A node asks a remote model for what only a local one can do."""


def refuse(node: str, what: str) -> NoReturn:
    """Raise for `node`, which wants `what`."""
    raise NotRemote(
        f"{node} {what}, and those of this model are on the LunaServe server. "
        f"Take it out, or load the model locally (Luna Model Router: daemon_mode force_local)."
    )


def refuse_block_patches(transformer_options: Mapping[str, Any]) -> None:
    """Refuse every patch that would run Python between or inside the UNet's blocks.

    Args:
        transformer_options: as ComfyUI hands them to a UNet; unknown values pass unless they can be called.

    Raises:
        NotRemote: naming the patch's place and its node.
    """
    for place, patches in transformer_options.get("patches", {}).items():
        for patch in patches:
            refuse(node_of(patch), f"patches the UNet's blocks ({place})")
    for place, patches in transformer_options.get("patches_replace", {}).items():
        for patch in patches.values():
            refuse(node_of(patch), f"replaces parts of the UNet's blocks ({place})")
    for key, value in transformer_options.items():
        if callable(value):
            refuse(node_of(value), f"changes how the UNet's blocks compute ({key})")


def node_of(patch: Callable) -> str:
    """The usual name of the node that made `patch`: its outermost class or function."""
    made_by = patch if hasattr(patch, "__qualname__") else type(patch)
    outermost = made_by.__qualname__.split(".")[0]
    if outermost in _USUAL_NAMES:
        return _USUAL_NAMES[outermost]
    module = made_by.__module__ or ""
    pack = module.split("custom_nodes.")[-1].split(".")[0] if "custom_nodes" in module else ""
    return f"{outermost} of {pack}" if pack else outermost
