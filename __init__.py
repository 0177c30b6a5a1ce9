"""Lets a clone of this repository sit in ComfyUI/custom_nodes."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _nodes():
    """Our nodes, imported under their absolute names.

    Raises:
        ImportError: another folder's packages answer to our names.
    """
    # Last, so that nothing of ours stands in the way of ComfyUI's own modules.
    sys.path.append(str(_HERE))
    import comfy_client.nodes
    import luna_client
    import luna_pictures
    import luna_protocol

    for package in (comfy_client, luna_client, luna_pictures, luna_protocol):
        found = Path(package.__file__).resolve().parent.parent
        if found != _HERE:
            raise ImportError(
                f"LunaServe in {_HERE} found the package {package.__name__!r} in {found}. "
                "Keep one copy of LunaServe in custom_nodes, and no other package of that name."
            )
    return comfy_client.nodes


WEB_DIRECTORY = "./comfy_client/web"
NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

if "folder_paths" in sys.modules:  # test runners import this file too, and there is no ComfyUI then
    _found = _nodes()
    NODE_CLASS_MAPPINGS |= _found.NODE_CLASS_MAPPINGS
    NODE_DISPLAY_NAME_MAPPINGS |= _found.NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
