"""FreeU: its nodes' patches are plain numbers in a closure, so the server can do the same."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from luna_protocol.messages import FreeU

_PLACE = "output_block_patch"
_VERSIONS = {"FreeU": 1, "FreeU_V2": 2}


def take_free_u(
    transformer_options: Mapping[str, Any], model_channels: int
) -> tuple[tuple[FreeU, ...], dict[str, Any]]:
    """The FreeU patches in their order, and the options without them.

    None are taken where other patches of the output blocks stand among them.
    """
    patches = transformer_options.get("patches", {})
    found = tuple(_settings(patch, model_channels) for patch in patches.get(_PLACE, ()))
    if not found or None in found:
        return (), dict(transformer_options)
    others = {place: kept for place, kept in patches.items() if place != _PLACE}
    return found, {**transformer_options, "patches": others}


def _settings(patch: Callable, model_channels: int) -> FreeU | None:
    """What a patch of ComfyUI's own FreeU nodes was made with; None for any other."""
    version = _VERSIONS.get(getattr(patch, "__qualname__", "").split(".")[0])
    if version is None or "nodes_freelunch" not in patch.__module__:
        return None
    scales = inspect.getclosurevars(patch).nonlocals.get("scale_dict", {})
    if list(scales) != [4 * model_channels, 2 * model_channels]:
        return None
    (b1, s1), (b2, s2) = scales.values()
    return FreeU(version=version, b1=b1, b2=b2, s1=s1, s2=s2)
