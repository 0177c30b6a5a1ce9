"""LoRA stacks on MODEL and CLIP in every mix of remote and local."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import folder_paths
from comfy.sd import load_lora_for_models
from comfy.utils import load_torch_file

from comfy_client.catalog import match_lora
from comfy_client.prompt_loras import LoraChoice
from comfy_client.proxies.patcher import RemotePatcher
from comfy_client.proxies.remote import interruptible
from luna_client.server import Server
from luna_protocol.errors import NotFound


def apply(model: Any, clip: Any, loras: Sequence[LoraChoice], server: Server) -> tuple[Any, Any]:
    """MODEL and CLIP with the LoRAs added in order.

    A remote one uses the server's own file where it has one, and else is sent ComfyUI's; a local one needs ComfyUI's.

    Raises:
        NotFound: a LoRA is in neither place, or only on the server while a local model needs it.
        LunaError: a remote one needs the server, which cannot be asked.
        InterruptProcessingException: the user cancelled.
    """
    remote = any(isinstance(patcher, RemotePatcher) for patcher in (model, clip.patcher))
    on_server = interruptible(server.index).loras if remote else []
    for lora in loras:
        model = _applied(model, lora.name, lora.strength, on_server, is_clip=False)
        clip = _applied(clip, lora.name, lora.strength_clip, on_server, is_clip=True)
    return model, clip


def known_here() -> list[str]:
    """The LoRA files of ComfyUI's own folders."""
    return folder_paths.get_filename_list("loras")


def identity(names: Iterable[str] | None, fingerprints: Mapping[str, str]) -> str:
    """A hash that changes when one of the LoRAs (None: any that there is) is another file than before.

    Args:
        fingerprints: {LoRA: fingerprint} of the server's.
    """
    here = known_here()
    if names is None:
        files = [*fingerprints.items(), *((name, _stamp(name)) for name in here)]
    else:
        files = [_files(name, fingerprints, here) for name in names]
    return hashlib.blake2b(repr(files).encode(), digest_size=16).hexdigest()


def _files(name: str, fingerprints: Mapping[str, str], here: list[str]) -> tuple:
    try:
        found, found_here = match_lora(name, list(fingerprints)), match_lora(name, here)
    except NotFound as several:
        return name, str(several)
    return name, found and fingerprints[found], found_here and _stamp(found_here)


def _stamp(name: str) -> tuple[int, int] | None:
    try:
        about = os.stat(folder_paths.get_full_path("loras", name) or "")
    except OSError:  # it is gone by now
        return None
    return about.st_mtime_ns, about.st_size


def _applied(target: Any, name: str, strength: float, on_server: list[str], is_clip: bool) -> Any:
    if strength == 0:
        return target
    patcher = target.patcher if is_clip else target
    remote = isinstance(patcher, RemotePatcher)
    if remote and (found := match_lora(name, on_server)):
        clone = target.clone()
        (clone.patcher if is_clip else clone).add_server_lora(found, strength)
        return clone
    found = match_lora(name, known_here())
    if found is None:
        places = f"in ComfyUI's loras folder: {_listed(known_here())}"
        more = f"on the server: {_listed(on_server)}; {places}" if remote else f"{places}; a local model needs it there"
        raise NotFound(f"there is no LoRA {name!r}", more)
    weights = load_torch_file(folder_paths.get_full_path_or_raise("loras", found), safe_load=True)
    if is_clip:
        return load_lora_for_models(None, target, weights, 0, strength)[1]
    return load_lora_for_models(target, None, weights, strength, 0)[0]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "none"
