"""Which files a job will have, and whether its tensors can become them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from torch import Tensor

from luna_pictures.encoding import EXTENSIONS, MAX_SIDE
from luna_pictures.filenames import model_variables, picture_name, render
from luna_pictures.metadata import generation_texts, jpeg_exif, model_texts, workflow_texts
from luna_protocol.errors import Impossible, Malformed, TooLarge
from luna_protocol.save_job import PictureGroup, SaveJob

MAX_ROWS = 64
MAX_PIXELS = 16 * 4096 * 4096  # of a whole job, which is decoded in memory
HEATMAPS = "_heatmaps"
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class NewFile:
    """A file that a job will have, and the name it would like: a picture, row `row` of group number `group`, or
    heatmaps."""

    path: PurePosixPath
    kind: str = "picture"
    group: int = 0
    row: int = 0
    width: int = 0
    height: int = 0


def plan(job: SaveJob, tensors: Mapping[str, Tensor], latent_channels: int, latent_scale: int) -> list[NewFile]:
    """The files of `job`: pictures in the order of its groups and their batch rows, then its heatmaps.

    Args:
        latent_channels, latent_scale: C of a latent [B, C, h, w], and pixels a side that one of its positions becomes.

    Raises:
        Malformed: tensors are missing or too many, of a wrong shape or dtype, or a template is wrong.
        TooLarge: more than `MAX_PIXELS`.
        Impossible: a picture that its format cannot hold, or tensors that are not finite.
    """
    named = {part.tensor for part in (*job.groups, *job.heatmaps)}
    if named != set(tensors):
        raise Malformed(
            f"the job names the tensors {sorted(named)} and came with {sorted(tensors)}", "send exactly those named"
        )
    files = []
    for number, group in enumerate(job.groups):
        rows, width, height, channels = _size(group, tensors[group.tensor], latent_channels, latent_scale)
        if not 1 <= rows <= MAX_ROWS or not 1 <= min(width, height) <= max(width, height) <= MAX_SIDE[group.format]:
            raise Impossible(
                f"{group.tensor} is {rows} pictures of {width} x {height}",
                f"send 1 to {MAX_ROWS} of at most {MAX_SIDE[group.format]} pixels a side as {group.format}",
            )
        if channels == 4 and group.format == "jpeg":
            raise Impossible(f"{group.tensor} has transparency, jpeg has not", "save it as png or webp")
        for row in range(rows):
            path = _path(job, group, row, rows, width, height)
            files.append(NewFile(path, "picture", number, row, width, height))
    pixels = sum(file.width * file.height for file in files)
    if pixels > MAX_PIXELS:
        raise TooLarge(f"the job has {pixels} pixels", f"send at most {MAX_PIXELS} in one job")
    for heatmap in job.heatmaps:
        tensor = tensors[heatmap.tensor]
        if tensor.ndim not in (2, 3) or tensor.dtype not in _FLOATING:
            raise Malformed(
                f"the heatmap {heatmap.tensor} is {tensor.dtype} {list(tensor.shape)}",
                "send floating [h, w] or [B, h, w]",
            )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Impossible(f"{name} holds NaN or infinity", "look for the node that made it")
    if job.heatmaps:
        folder = render(job.save_path, _variables(job), job.created) / HEATMAPS
        files.append(NewFile(folder / f"{job.job_id}.safetensors", "heatmaps"))
    return files


def warnings(job: SaveJob) -> list[str]:
    """What will be saved otherwise than asked."""
    jpegs = [group for group in job.groups if group.format == "jpeg"]
    left_out = [jpeg_exif(workflow_texts(job), generation_texts(job, group, 0))[1] for group in jpegs]
    return sorted({warning for warning in left_out if warning})


def _path(job: SaveJob, group: PictureGroup, row: int, rows: int, width: int, height: int) -> PurePosixPath:
    variables = _variables(job) | {"width": width, "height": height, "batch": f"{row:02d}"}
    name = render(job.filename, variables, job.created)
    if name.name == "":
        raise Malformed(f"the filename template {job.filename!r} gives no name", "write at least one letter")
    folder = render(job.save_path, variables, job.created) / name.parent
    if group.subdir and group.affix:
        folder /= render(group.affix, {}, job.created)
    number = row if rows > 1 and "%batch%" not in job.filename else None
    return picture_name(folder, name.name, group.affix, number, EXTENSIONS[group.format])


def _variables(job: SaveJob) -> dict[str, object]:
    from_path = model_variables(str(job.metadata.get("model_path") or job.metadata.get("model") or "model"))
    variables = from_path | {"model_name": model_texts(job)["model_name"] or from_path["model_name"]}
    shown = {key: job.metadata.get(key, "") for key in ("seed", "width", "height")}
    return variables | shown | {"index": f"{job.filename_index:05d}", "batch": ""}


def _size(group: PictureGroup, tensor: Tensor, latent_channels: int, latent_scale: int) -> tuple[int, int, int, int]:
    """Rows, width, height and channels of the pictures."""
    shape = tuple(tensor.shape)
    if group.source == "latent":
        if len(shape) != 4 or shape[1] != latent_channels or tensor.dtype not in _FLOATING:
            raise Malformed(
                f"the latent {group.tensor} is {tensor.dtype} {list(shape)}",
                f"send floating [B, {latent_channels}, h, w]",
            )
        return shape[0], shape[3] * latent_scale, shape[2] * latent_scale, 3
    if len(shape) != 4 or shape[3] not in (3, 4) or tensor.dtype not in (*_FLOATING, torch.uint8):
        raise Malformed(
            f"the image {group.tensor} is {tensor.dtype} {list(shape)}", "send floating 0..1 or uint8 [B, H, W, 3 or 4]"
        )
    return shape[0], shape[2], shape[1], shape[3]
