"""The same files loaded by ComfyUI itself, for when the server is not to be used."""

from typing import Any

import folder_paths
import nodes

from luna_protocol.errors import NotFound

_PLACE = {"unet": 0, "clip": 1, "vae": 2}


def loaded(checkpoints: dict[str, str]) -> dict[str, Any]:
    """{role: MODEL, CLIP or VAE} for {role: file in ComfyUI's own folders}, through ComfyUI's own loaders.

    Raises:
        NotFound: ComfyUI does not have one of the files.
    """
    whole = {name: _spelling("checkpoints", name) for name in checkpoints.values()}
    parts = {name: nodes.CheckpointLoaderSimple().load_checkpoint(here) for name, here in whole.items() if here}
    return {
        role: parts[name][_PLACE[role]] if name in parts else _lone(role, name) for role, name in checkpoints.items()
    }


def _lone(role: str, name: str) -> Any:
    """A file that holds this part alone."""
    folder = {"unet": "diffusion_models", "clip": "text_encoders", "vae": "vae"}[role]
    here = _spelling(folder, name)
    if here is None:
        raise NotFound(f"ComfyUI has no {name!r} in its folders checkpoints and {folder}", "copy or link it there")
    if role == "unet":
        return nodes.UNETLoader().load_unet(here, "default")[0]
    if role == "clip":
        return nodes.CLIPLoader().load_clip(here, "stable_diffusion")[0]
    return nodes.VAELoader().load_vae(here)[0]


def _spelling(folder: str, name: str) -> str | None:
    """How the file is called in a folder of this ComfyUI; a workflow may come from Windows."""
    return next((each for each in (name, name.replace("\\", "/")) if folder_paths.get_full_path(folder, each)), None)
