"""LoRA stacks on MODEL and CLIP in every mix of remote and local."""

from collections.abc import Sequence
from typing import Any

import folder_paths
from comfy.sd import load_lora_for_models
from comfy.utils import load_torch_file

from comfy_client.catalog import match_lora
from comfy_client.prompt_loras import LoraChoice
from comfy_client.proxies.patcher import RemotePatcher
from luna_protocol.errors import NotFound


def apply(model: Any, clip: Any, loras: Sequence[LoraChoice], on_server: list[str]) -> tuple[Any, Any]:
    """MODEL and CLIP (either may be None) with the LoRAs added in order.

    A remote one uses the server's own file where it has one, and else is sent ComfyUI's; a local one needs ComfyUI's.

    Args:
        on_server: the LoRAs that the server has.

    Raises:
        NotFound: a LoRA is in neither place, or only on the server while a local model needs it.
    """
    for lora in loras:
        model = _applied(model, lora.name, lora.strength, on_server, is_clip=False)
        clip = _applied(clip, lora.name, lora.strength_clip, on_server, is_clip=True)
    return model, clip


def known_here() -> list[str]:
    """The LoRA files of ComfyUI's own folders."""
    return folder_paths.get_filename_list("loras")


def _applied(target: Any, name: str, strength: float, on_server: list[str], is_clip: bool) -> Any:
    if target is None or strength == 0:
        return target
    patcher = target.patcher if is_clip else target
    remote = isinstance(patcher, RemotePatcher)
    if remote and (found := match_lora(name, on_server)):
        clone = target.clone()
        (clone.patcher if is_clip else clone).add_server_lora(found, strength)
        return clone
    found = match_lora(name, known_here())
    if found is None:
        raise NotFound(
            f"there is no LoRA {name!r}",
            f"on the server: {_listed(on_server)}; in ComfyUI's loras folder: {_listed(known_here())}"
            + ("" if remote else "; a local model needs it in ComfyUI's folder"),
        )
    weights = load_torch_file(folder_paths.get_full_path_or_raise("loras", found), safe_load=True)
    if is_clip:
        return load_lora_for_models(None, target, weights, 0, strength)[1]
    return load_lora_for_models(target, None, weights, strength, 0)[0]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "none"
