"""What is written into a picture about how it was made: PNG text chunks, or EXIF for webp and jpeg, as ComfyUI reads
them back."""

import json
import time
from collections.abc import Mapping

from PIL import Image

from luna_pictures.filenames import model_variables
from luna_protocol.save_job import PictureGroup, SaveJob

# JPEG keeps EXIF in one segment, whose length has 16 bits.
MAX_JPEG_EXIF = 65_533

_MODEL, _MAKE, _EXIF_IFD, _USER_COMMENT = 0x0110, 0x010F, 0x8769, 0x9286
# Make and the four tags below it hold text; the next one is a number by TIFF's rules.
_TEXT_TAGS = 5


def workflow_texts(job: SaveJob) -> dict[str, str]:
    """`prompt` and every `extra_pnginfo` key as JSON: what ComfyUI restores a workflow from."""
    if not (job.embed_metadata and job.embed_workflow):
        return {}
    texts = {} if job.prompt is None else {"prompt": json.dumps(job.prompt)}
    return texts | {key: json.dumps(value) for key, value in job.extra_pnginfo.items()}


def generation_texts(job: SaveJob, group: PictureGroup, row: int) -> dict[str, str]:
    """How the picture of batch row `row` was made; the same whenever the job is done again."""
    if not job.embed_metadata:
        return {}
    texts = {
        "generation_metadata": json.dumps(job.metadata) if job.metadata else "",
        "custom_metadata": plain(job.custom_metadata),
        "image_type": plain(group.affix),
        **model_texts(job),
        "save_timestamp": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(job.created)),
        "batch_index": str(row),
    }
    return {key: text for key, text in texts.items() if text}


def model_texts(job: SaveJob) -> dict[str, str]:
    """`model_name` and `model_path`: as the metadata names them, else from its `model`."""
    from_path = model_variables(str(job.metadata.get("model_path") or job.metadata.get("model") or ""))
    return {key: plain(str(job.metadata.get(key) or from_path[key])) for key in ("model_name", "model_path")}


def plain(text: str) -> str:
    """`text` without what neither PNG nor databases hold: NUL and halves of surrogate pairs."""
    return text.replace("\0", "").encode(errors="replace").decode()


def exif(workflow: Mapping[str, str], generation: Mapping[str, str]) -> bytes:
    """Model holds the prompt, Make and the tags below it one item each (`key:JSON`), UserComment the rest as JSON."""
    if not (workflow or generation):
        return b""
    tags = Image.Exif()
    rest = dict(generation)
    tag = _MAKE
    for key, text in workflow.items():
        if key == "prompt":
            tags[_MODEL] = f"prompt:{text}"
        elif tag > _MAKE - _TEXT_TAGS:
            tags[tag] = f"{key}:{text}"
            tag -= 1
        else:
            rest[key] = text
    if rest:
        tags.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"ASCII\0\0\0" + json.dumps(rest).encode("ascii")
    return tags.tobytes()


def jpeg_exif(workflow: Mapping[str, str], generation: Mapping[str, str]) -> tuple[bytes, str | None]:
    """EXIF that fits a JPEG, and what had to be left out for that, or None."""
    whole = exif(workflow, generation)
    if len(whole) <= MAX_JPEG_EXIF:
        return whole, None
    smaller = exif({}, generation)
    if len(smaller) <= MAX_JPEG_EXIF:
        return smaller, f"the workflow ({len(whole)} bytes) does not fit into a JPEG's 64 KB: webp and png hold it"
    return b"", f"the metadata ({len(whole)} bytes) does not fit into a JPEG's 64 KB: webp and png hold it"
