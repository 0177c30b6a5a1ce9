"""Luna Multi Saver (Async): latents to pictures on the server while ComfyUI samples on."""

import socket
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from server import PromptServer

from comfy_client import local
from comfy_client.notice import warn
from comfy_client.proxies.vae import RemoteAutoencoder
from comfy_client.queue_watch import QueueWatch
from comfy_client.saving import Batch, job_of, save_here
from luna_protocol.errors import Unavailable
from luna_protocol.messages import validate
from luna_protocol.save_job import SaveAccepted, SaveJob

_SLOTS = range(1, 6)
_AFFIXES = ("ORIG", "UPSCALED", "DETAILED", "FINAL", "IMAGE5")
_FORMATS = ["png", "png16", "webp", "jpeg", "no save"]
_HEATMAPS = [(polarity, stage) for polarity in ("positive", "negative") for stage in ("original", "modified")]
_WATCH = QueueWatch(lambda event, message: PromptServer.instance.send_sync(event, message))


class LunaMultiSaver:
    TITLE = "Luna Multi Saver (Async)"
    CATEGORY = "Luna"
    DESCRIPTION = (
        "Hands up to five latents or images to the server's decode queue and returns at once: the next batch starts "
        "while they are decoded, named, tagged and saved. With a local VAE, or no server, ComfyUI saves them itself."
    )
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("job_id", "files")
    OUTPUT_TOOLTIPS = ("The job's id in the queue.", "Paths under the output folder, one a line.")
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required: dict[str, Any] = {
            "vae": ("VAE", {"tooltip": "A VAE on the server (of Luna Model Router): its worker decodes and saves."}),
            "save_path": (
                "STRING",
                {"default": "", "tooltip": "Folder under the output folder; may hold the variables of filename."},
            ),
            "filename": (
                "STRING",
                {
                    "default": "%time:YYYY_mm_dd.HH.MM.SS%_%model_name%",
                    "tooltip": "%model_name% %model_path% %model_dir% %index% %time:YYYY_mm_dd.HH.MM.SS% %seed% "
                    "%width% %height% %batch%",
                },
            ),
            "save_mode": (
                ["daemon", "database_store"],
                {"tooltip": "database_store also writes a database row for each picture."},
            ),
            "priority": ("INT", {"default": 0, "min": -100, "max": 100, "tooltip": "Higher goes first."}),
            "quality_gate": (
                ["disabled", "variance", "edge_density", "both"],
                {"tooltip": "Pictures below min_quality go to a _discarded folder."},
            ),
            "min_quality": (
                "FLOAT",
                {"default": 0.3, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "0 flat, 1 like a photograph."},
            ),
        }
        for slot, affix in zip(_SLOTS, _AFFIXES, strict=True):
            required |= {
                f"affix_{slot}": ("STRING", {"default": affix, "tooltip": f"Goes into the names of slot {slot}."}),
                f"format_{slot}": (_FORMATS, {"default": "webp", "tooltip": "png16 has 16 bits a channel."}),
                f"subdir_{slot}": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "A folder of its own, called as the affix."},
                ),
            }
        required |= {
            "png_compression": ("INT", {"default": 4, "min": 0, "max": 9, "tooltip": "0 stored, 9 smallest."}),
            "lossy_quality": (
                "INT",
                {"default": 90, "min": 70, "max": 100, "tooltip": "Of jpeg, and of webp if lossy."},
            ),
            "lossless_webp": ("BOOLEAN", {"default": False, "tooltip": "webp without loss."}),
            "embed_workflow": ("BOOLEAN", {"default": True, "tooltip": "Dropping the picture on ComfyUI restores it."}),
            "embed_metadata": ("BOOLEAN", {"default": True, "tooltip": "Off: nothing about its making is written."}),
            "filename_index": ("INT", {"default": 0, "min": 0, "max": 10000, "tooltip": "What %index% shows."}),
        }
        optional: dict[str, Any] = {}
        for slot in _SLOTS:
            optional[f"latent_{slot}"] = ("LATENT", {"tooltip": f"Slot {slot}: decoded by the VAE."})
            optional[f"image_{slot}"] = ("IMAGE", {"tooltip": f"Slot {slot}: saved as it is."})
        optional |= {
            "metadata": ("METADATA", {"tooltip": "From Luna Config Gateway; fills the variables and the database."}),
            "custom_metadata": ("STRING", {"default": "", "multiline": True, "tooltip": "A text of your own."}),
        }
        for polarity, stage in _HEATMAPS:
            told = f"DAAM heatmaps of the {polarity} prompt as it was, " + (
                "changed." if stage == "modified" else "first."
            )
            optional[f"heatmap_{polarity}_{stage}"] = ("MASK", {"tooltip": told})
        return {
            "required": required,
            "optional": optional,
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO", "node": "UNIQUE_ID"},
        }

    def save(self, vae: Any, node: str, prompt: Any = None, extra_pnginfo: dict | None = None, **inputs: Any):
        slots = {slot: {key: inputs.pop(f"{key}_{slot}") for key in ("affix", "format", "subdir")} for slot in _SLOTS}
        given = {slot: (inputs.pop(f"latent_{slot}", None), inputs.pop(f"image_{slot}", None)) for slot in _SLOTS}
        batches = [
            Batch(slot, **slots[slot], latent=latent and latent["samples"], image=image)
            for slot, (latent, image) in given.items()
            if slots[slot]["format"] != "no save" and (latent is not None or image is not None)
        ]
        maps = {pair: inputs.pop("heatmap_{}_{}".format(*pair), None) for pair in _HEATMAPS}
        job, tensors = job_of(
            batches,
            {pair: tensor for pair, tensor in maps.items() if tensor is not None},
            client=f"{socket.gethostname()[:50]}:{args.port}",
            metadata=inputs.pop("metadata", None) or {},
            prompt=prompt,
            extra_pnginfo=extra_pnginfo or {},
            **inputs,
        )
        files = self._send(vae, job, tensors, node)
        return {"ui": {"text": files}, "result": (job.job_id, "\n".join(files))}

    def _send(self, vae: Any, job: SaveJob, tensors: dict[str, Any], node: str) -> list[str]:
        autoencoder = vae.first_stage_model
        if not isinstance(autoencoder, RemoteAutoencoder):
            return _save_locally(job, tensors, vae, "the VAE is ComfyUI's own")
        remote = autoencoder.remote
        try:
            message, _ = remote.ask(job, tensors)
        except Unavailable as error:
            own = local.loaded({"vae": remote.model.checkpoint})["vae"]
            return _save_locally(job, tensors, own, str(error))
        accepted = validate(SaveAccepted, message)
        for warning in accepted.warnings:
            warn(f"Luna Multi Saver: {warning}")
        _WATCH.follow(remote.replicas.server, job.job_id, node)
        return accepted.files


def _save_locally(job: SaveJob, tensors: dict[str, Any], vae: Any, why: str) -> list[str]:
    files = save_here(job, tensors, vae.decode, Path(folder_paths.get_output_directory()))
    lacking = [
        *(["database rows"] if job.save_mode == "database_store" else []),
        *(["heatmaps"] if job.heatmaps else []),
    ]
    without = f", without {' and '.join(lacking)}" if lacking else ""
    warn(f"Luna Multi Saver: ComfyUI decoded and saved {len(files)} pictures itself{without}, because {why}")
    return files


NODES = {"LunaMultiSaver": LunaMultiSaver}
