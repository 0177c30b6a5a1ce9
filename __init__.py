"""Lets a clone of this repository sit in ComfyUI/custom_nodes."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent
_OURS = ("protocol", "comfy_client")


def _import_nodes() -> ModuleType:
    """Our nodes, imported under their absolute names.

    ComfyUI has a module `protocol` of its own. Ours takes its place while our packages are imported, which binds all
    they need, and then ComfyUI's is put back.

    Raises:
        ImportError: another folder's packages answer to our names.
    """
    theirs = sys.modules.pop("protocol", None)
    sys.path.insert(0, str(_HERE))
    try:
        nodes = importlib.import_module("comfy_client.nodes")
        for name in _OURS:
            found = Path(sys.modules[name].__file__).parent
            if found != _HERE / name:
                raise ImportError(
                    f"LunaServe in {_HERE} found the package {name!r} in {found}. "
                    "Keep one copy of LunaServe in custom_nodes, and no other package of that name."
                )
        return nodes
    finally:
        sys.path.remove(str(_HERE))
        if theirs is not None:
            sys.modules["protocol"] = theirs


WEB_DIRECTORY = "./comfy_client/web"
NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

if "folder_paths" in sys.modules:  # test runners import this file too, and there is no ComfyUI then
    _nodes = _import_nodes()
    NODE_CLASS_MAPPINGS |= _nodes.NODE_CLASS_MAPPINGS
    NODE_DISPLAY_NAME_MAPPINGS |= _nodes.NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
