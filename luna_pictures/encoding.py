"""Pictures to bytes: png (8 and 16 bits), webp and jpeg, with their metadata."""

import io

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from luna_pictures.metadata import exif, generation_texts, jpeg_exif, workflow_texts
from luna_pictures.png import FAST_LEVELS, png
from luna_protocol.save_job import PictureFormat, PictureGroup, SaveJob

EXTENSIONS: dict[PictureFormat, str] = {"png": "png", "png16": "png", "webp": "webp", "jpeg": "jpg"}
_MAX_SIDE: dict[PictureFormat, int] = {"png": 2**31 - 1, "png16": 2**31 - 1, "webp": 16_383, "jpeg": 65_500}
_THUMBNAIL = 256


def fitting(wanted: PictureFormat, height: int, width: int, channels: int) -> PictureFormat:
    """`wanted`, or png where that cannot hold such a picture: webp and jpeg end at some side, jpeg has no
    transparency."""
    holds = max(height, width) <= _MAX_SIDE[wanted] and not (wanted == "jpeg" and channels == 4)
    return wanted if holds else "png"


def encode(picture: np.ndarray, job: SaveJob, group: PictureGroup, row: int) -> bytes:
    """The file's content for `picture` [H, W, 3 or 4], floating 0..1 or uint8, which is batch row `row` of `group`, in
    the `fitting` format."""
    kind = fitting(group.format, *picture.shape)
    workflow, generation = workflow_texts(job), generation_texts(job, group, row)
    if kind == "png16":
        return png(_to_16_bits(picture), job.png_compression, workflow | generation)
    if kind == "png" and job.png_compression <= FAST_LEVELS[-1]:
        return png(to_8_bits(picture), job.png_compression, workflow | generation)
    image = Image.fromarray(to_8_bits(picture))
    file = io.BytesIO()
    match kind:
        case "png":
            info = PngInfo()
            for key, text in (workflow | generation).items():
                info.add_text(key, text)
            image.save(file, "PNG", compress_level=job.png_compression, pnginfo=info)
        case "webp" if job.lossless_webp:
            # Effort 1 gives within 0.1 % of the default's size in a fifth of its time.
            image.save(file, "WEBP", lossless=True, quality=0, method=1, exif=exif(workflow, generation))
        case "webp":
            image.save(file, "WEBP", quality=job.lossy_quality, method=2, exif=exif(workflow, generation))
        case "jpeg":
            image.save(file, "JPEG", quality=job.lossy_quality, exif=jpeg_exif(workflow, generation)[0])
    return file.getvalue()


def thumbnail(picture: np.ndarray) -> bytes:
    """A JPEG of `picture`, at most 256 pixels a side."""
    step = max(1, min(picture.shape[:2]) // (2 * _THUMBNAIL))
    image = Image.fromarray(to_8_bits(picture[::step, ::step, :3]))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def to_8_bits(picture: np.ndarray) -> np.ndarray:
    """Rounds down as ComfyUI's SaveImage does, so that the same seed gives the same file there and here."""
    if picture.dtype == np.uint8:
        return np.ascontiguousarray(picture)
    return (np.clip(picture, 0, 1) * np.float32(255)).astype(np.uint8)


def _to_16_bits(picture: np.ndarray) -> np.ndarray:
    if picture.dtype == np.uint8:
        return picture.astype(np.uint16) * 257
    return np.round(np.clip(picture, 0, 1) * np.float32(65_535)).astype(np.uint16)
