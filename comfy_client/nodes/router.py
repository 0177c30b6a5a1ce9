"""Luna Model Router: MODEL, CLIP and VAE from the server, or ComfyUI's own in their place."""

from typing import Any

import folder_paths

from comfy_client import local, settings
from comfy_client.catalog import spelt_once
from comfy_client.nodes import choices
from comfy_client.notice import warn
from comfy_client.proxies.served import served
from luna_protocol.errors import LunaError, NotFound

CHECKPOINT_ATTACHMENT = "luna_checkpoint"
_SAME = "from checkpoint"


class LunaModelRouter:
    TITLE = "Luna Model Router"
    CATEGORY = "Luna"
    DESCRIPTION = "MODEL, CLIP and VAE that live on a LunaServe server and work with every stock node."
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "STRING")
    RETURN_NAMES = ("model", "clip", "vae", "status")
    OUTPUT_TOOLTIPS = (
        "Samples on the server; patch, guide and schedule it as any MODEL.",
        "Encodes on the server; prompts are tokenised and weighted here.",
        "Encodes and decodes on the server.",
        "Where each part runs, and why.",
    )
    FUNCTION = "route"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        whole = spelt_once(choices.files("unet"), folder_paths.get_filename_list("checkpoints"))
        part = {role: [_SAME, *choices.files(role)] for role in ("unet", "clip", "vae")}
        return {
            "required": {
                "checkpoint": (
                    whole,
                    {
                        "tooltip": "A checkpoint that the server can serve (it is loaded there if it is not yet), "
                        "or one of ComfyUI's own."
                    },
                ),
                "unet": (part["unet"], {"tooltip": "Take the MODEL from another of the server's files."}),
                "clip": (part["clip"], {"tooltip": "Take the CLIP from another of the server's files."}),
                "vae": (part["vae"], {"tooltip": "Take the VAE from another of the server's files."}),
                "daemon_mode": (
                    ["auto", "force_daemon", "force_local"],
                    {
                        "default": "auto",
                        "tooltip": "auto: the server, or ComfyUI's own copy with a warning when the server cannot. "
                        "force_daemon: the server or an error. force_local: never the server.",
                    },
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, checkpoint: str, unet: str, clip: str, vae: str) -> bool:
        # The lists are of when the server was last seen; what a name lacks is said when the node runs.
        return True

    @classmethod
    def IS_CHANGED(cls, checkpoint: str, unet: str, clip: str, vae: str, daemon_mode: str) -> str:
        return "local" if daemon_mode == "force_local" else choices.identity(_wanted(checkpoint, unet, clip, vae))

    def route(self, checkpoint: str, unet: str, clip: str, vae: str, daemon_mode: str):
        wanted = _wanted(checkpoint, unet, clip, vae)
        if daemon_mode == "force_local":
            parts, status = local.loaded(wanted), "local, as daemon_mode says"
        else:
            server = settings.server()
            try:
                parts, status = served(server, wanted), f"on {server.inference}"
            except LunaError as error:
                if daemon_mode == "force_daemon":
                    raise
                parts, status = self._fallback(wanted, error), f"local, because {error}"
        model = parts["unet"].clone()
        model.set_attachments(CHECKPOINT_ATTACHMENT, wanted["unet"].replace("\\", "/"))
        return model, parts["clip"], parts["vae"], f"{', '.join(sorted(set(wanted.values())))}: {status}"

    def _fallback(self, wanted: dict[str, str], error: LunaError) -> dict[str, Any]:
        try:
            parts = local.loaded(wanted)
        except NotFound as absent:
            raise NotFound(
                f"neither the server nor ComfyUI can give {', '.join(sorted(set(wanted.values())))}",
                f"server: {error}; ComfyUI: {absent}",
            ) from error
        warn(f"Luna Model Router runs locally: {error}")
        return parts


def _wanted(checkpoint: str, unet: str, clip: str, vae: str) -> dict[str, str]:
    chosen = {"unet": unet, "clip": clip, "vae": vae}
    return {role: checkpoint if file == _SAME else file for role, file in chosen.items()}


NODES = {"LunaModelRouter": LunaModelRouter}
