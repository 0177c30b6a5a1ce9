"""Luna Multi Saver (Async): latents to pictures on the server while ComfyUI samples on."""

import logging
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy.model_management import InterruptProcessingException
from server import PromptServer

from comfy_client import local
from comfy_client.notice import warn
from comfy_client.proxies.vae import RemoteAutoencoder
from comfy_client.queue_watch import QueueWatch
from comfy_client.saving import Batch, job_of
from comfy_client.saving_here import save_here
from luna_pictures.filenames import check_template
from luna_protocol.errors import Impossible, Malformed, Unavailable
from luna_protocol.messages import validate
from luna_protocol.save_job import SaveAccepted, SaveJob

log = logging.getLogger(__name__)

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
                    "%width% %height% %batch%, and all of Save Image: %date:yyyy-MM-dd% %year% %KSampler.steps% ...",
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

    @classmethod
    def VALIDATE_INPUTS(cls, save_path: str | None = None, filename: str | None = None) -> bool | str:
        for name, template in (("save_path", save_path), ("filename", filename)):
            try:
                check_template(template or "")  # None where another node gives it
            except Malformed as error:
                return f"{name}: {error}"
        return True

    def save(self, vae: Any, node: str, prompt: Any = None, extra_pnginfo: dict | None = None, **inputs: Any):
        slots = {slot: {key: inputs.pop(f"{key}_{slot}") for key in ("affix", "format", "subdir")} for slot in _SLOTS}
        batches = []
        for slot, chosen in slots.items():
            latent, image = inputs.pop(f"latent_{slot}", None), inputs.pop(f"image_{slot}", None)
            given = [{"latent": latent and latent["samples"]}, {"image": image}]
            if chosen["format"] != "no save":
                batches += [Batch(slot, **chosen, **each) for each in given if None not in each.values()]
        maps = {pair: inputs.pop("heatmap_{}_{}".format(*pair), None) for pair in _HEATMAPS}
        job, tensors, notes = job_of(
            batches,
            {pair: tensor for pair, tensor in maps.items() if tensor is not None},
            client=f"{socket.gethostname()[:50]}:{args.port}",
            prompt=prompt,
            extra_pnginfo=extra_pnginfo,
            **inputs,
        )
        files, others = _send(vae, job, tensors, node)
        if notes := notes + others:
            warn(f"Luna Multi Saver: {'; '.join(notes)}")
        return {"ui": {"text": [*files, *notes]}, "result": (job.job_id, "\n".join(files))}


def _send(vae: Any, job: SaveJob, tensors: dict[str, Any], node: str) -> tuple[list[str], list[str]]:
    """The files, and what is saved otherwise than asked: by the server, or here where that fails for any reason."""
    autoencoder = getattr(vae, "first_stage_model", None)
    if not isinstance(autoencoder, RemoteAutoencoder):
        return _save_locally(job, tensors, [vae.decode], "the VAE is ComfyUI's own")
    remote = autoencoder.remote
    try:
        accepted = validate(SaveAccepted, remote.ask(job, tensors)[0])
    except InterruptProcessingException:
        raise
    except Exception as error:
        log.info("the server did not take job %s", job.job_id, exc_info=error)
        own = cache(lambda: local.loaded({"vae": remote.model.checkpoint})["vae"])
        gone = isinstance(error, Unavailable) and error.retry_after is None
        ways = [] if gone else [vae.decode]
        return _save_locally(job, tensors, [*ways, lambda latent: own().decode(latent)], str(error) or repr(error))
    _WATCH.follow(remote.replicas.server, job.job_id, node)
    return accepted.files, accepted.warnings


def _save_locally(
    job: SaveJob, tensors: dict[str, Any], ways: list[Callable[[Any], Any]], why: str
) -> tuple[list[str], list[str]]:
    output, spare = Path(folder_paths.get_output_directory()), Path(folder_paths.get_temp_directory())
    try:
        files, notes = save_here(job, tensors, _first_that_works(ways), [output, spare])
    except Impossible as error:
        raise Impossible(str(error), f"ComfyUI tried, because {why}") from error
    lacking = [
        *(["database rows"] if job.save_mode == "database_store" else []),
        *(["heatmaps"] if job.heatmaps else []),
    ]
    without = f", without {' and '.join(lacking)}" if lacking else ""
    count = sum(not file.endswith(".latent") for file in files)
    return files, [f"ComfyUI decoded and saved {count} pictures itself{without}, because {why}", *notes]


def _first_that_works(ways: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Decodes in the first of these ways that does not fail, and stays with it."""
    reasons = []

    def decode(latent: Any) -> Any:
        while ways:
            try:
                return ways[0](latent)
            except InterruptProcessingException:
                raise
            except Exception as error:
                reasons.append(str(error))
                ways.pop(0)
        raise Impossible(f"it could not be decoded: {'; '.join(reasons)}")

    return decode


NODES = {"LunaMultiSaver": LunaMultiSaver}
