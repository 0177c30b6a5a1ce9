"""Which files a job will have, and whether its tensors can become them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from torch import Tensor

from luna_pictures.encoding import EXTENSIONS, fitting
from luna_pictures.filenames import (
    MAX_PATH_BYTES,
    check_template,
    fitted,
    model_variables,
    picture_name,
    render,
    unknown_variables,
)
from luna_pictures.metadata import generation_texts, jpeg_exif, model_texts, workflow_texts
from luna_protocol.errors import Impossible, Malformed, TooLarge
from luna_protocol.save_job import PictureGroup, SaveJob

MAX_ROWS = 4096  # ComfyUI's own bound of a batch
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


def plan(
    job: SaveJob,
    tensors: Mapping[str, Tensor],
    latent_channels: int,
    latent_scale: int,
    room: int = MAX_PATH_BYTES,
) -> tuple[list[NewFile], list[str]]:
    """The files of `job`, pictures in the order of its groups and their batch rows, then its heatmaps; and what will be
    saved otherwise than asked.

    Args:
        latent_channels, latent_scale: C of a latent [B, C, h, w], and pixels a side that one of its positions becomes.
        room: bytes that a path may have.

    Raises:
        Malformed: tensors are missing or too many, of a wrong shape or dtype, or a template leaves the output folder.
        TooLarge: more than `MAX_PIXELS`.
        Impossible: nothing that a picture could be made of, or heatmaps that are not finite.
    """
    named = {part.tensor for part in (*job.groups, *job.heatmaps)}
    if named != set(tensors):
        raise Malformed(
            f"the job names the tensors {sorted(named)} and came with {sorted(tensors)}", "send exactly those named"
        )
    for template in (job.save_path, job.filename):
        check_template(template)
    files, told = [], warnings(job)
    for number, group in enumerate(job.groups):
        tensor = tensors[group.tensor]
        rows, height, width, channels = _size(group, tensor, latent_channels, latent_scale)
        if not 1 <= rows <= MAX_ROWS or min(width, height) < 1:
            raise Impossible(
                f"{group.tensor} is {rows} pictures of {width} x {height}",
                f"send 1 to {MAX_ROWS} of at least one pixel",
            )
        told += picture_warnings(group, height, width, channels)
        finite = finite_rows(tensor)
        told += nan_warnings(group, rows, finite)
        for row in finite:
            path = picture_path(job, group, row if rows > 1 else None, (height, width, channels), room)
            files.append(NewFile(path, "picture", number, row, width, height))
    if not files:
        raise Impossible("; ".join(told), "look for the node that made it")
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
        if not torch.isfinite(tensor).all():
            raise Impossible(f"{heatmap.tensor} holds NaN or infinity", "look for the node that made it")
    if job.heatmaps:
        folder = render(job.save_path, _variables(job), job.created) / HEATMAPS
        path = PurePosixPath(*fitted(folder.parts, room), f"{job.job_id}.safetensors")
        files.append(NewFile(path, "heatmaps"))
    return files, told


def finite_rows(tensor: Tensor) -> list[int]:
    """The batch rows without NaN and infinity: what a picture can be made of."""
    return torch.isfinite(tensor).flatten(1).all(1).nonzero().flatten().tolist()


def nan_warnings(group: PictureGroup, rows: int, finite: Sequence[int]) -> list[str]:
    """What becomes of the rows that are not among the `finite`."""
    others = ", ".join(str(row) for row in range(rows) if row not in finite)
    return [f"{group.tensor} holds NaN or infinity in batch row {others}, which makes no picture"] if others else []


def warnings(job: SaveJob) -> list[str]:
    """What will be saved otherwise than asked, whatever the tensors are."""
    jpegs = [group for group in job.groups if group.format == "jpeg"]
    left_out = {jpeg_exif(workflow_texts(job), generation_texts(job, group, 0))[1] for group in jpegs}
    known = (*_variables(job), "batch_num")
    unknown = dict.fromkeys(unknown_variables(f"{job.save_path}/{job.filename}", known))
    return [
        *sorted(left_out - {None}),
        *(f"{name} is no variable that the saver knows, and stays in the name as it is" for name in unknown),
    ]


def picture_warnings(group: PictureGroup, height: int, width: int, channels: int) -> list[str]:
    """What becomes of a format that cannot hold such pictures."""
    if fitting(group.format, height, width, channels) == group.format:
        return []
    kind = "transparent pictures" if channels == 4 else "pictures"
    return [f"{group.tensor} is saved as png: {group.format} holds no {kind} of {width} x {height}"]


def picture_path(
    job: SaveJob, group: PictureGroup, row: int | None, shape: tuple[int, int, int], room: int = MAX_PATH_BYTES
) -> PurePosixPath:
    """The file of a picture [H, W, C], in batch row `row` of several."""
    variables = _variables(job) | {"height": shape[0], "width": shape[1]}
    variables |= {"batch": f"{row or 0:02d}", "batch_num": row or 0}
    name = render(job.filename, variables, job.created)
    if not name.name:
        name = render(SaveJob.model_fields["filename"].default, variables, job.created)
    folder = render(job.save_path, variables, job.created) / name.parent
    affix = render(group.affix, variables, job.created)
    if group.subdir:
        folder /= affix
    number = None if "%batch%" in job.filename or "%batch_num%" in job.filename else row
    extension = EXTENSIONS[fitting(group.format, *shape)]
    return picture_name(folder, name.name, "_".join(affix.parts), number, extension, room)


def _variables(job: SaveJob) -> dict[str, object]:
    from_path = model_variables(str(job.metadata.get("model_path") or job.metadata.get("model") or "model"))
    variables = from_path | {"model_name": model_texts(job)["model_name"] or from_path["model_name"]}
    shown = {key: job.metadata.get(key, "") for key in ("seed", "width", "height")}
    return variables | shown | {"index": f"{job.filename_index:05d}", "batch": ""}


def _size(group: PictureGroup, tensor: Tensor, latent_channels: int, latent_scale: int) -> tuple[int, int, int, int]:
    """Rows, height, width and channels of the pictures."""
    shape = tuple(tensor.shape)
    if group.source == "latent":
        if len(shape) != 4 or shape[1] != latent_channels or tensor.dtype not in _FLOATING:
            raise Malformed(
                f"the latent {group.tensor} is {tensor.dtype} {list(shape)}",
                f"send floating [B, {latent_channels}, h, w]",
            )
        return shape[0], shape[2] * latent_scale, shape[3] * latent_scale, 3
    if len(shape) != 4 or shape[3] not in (3, 4) or tensor.dtype not in (*_FLOATING, torch.uint8):
        raise Malformed(
            f"the image {group.tensor} is {tensor.dtype} {list(shape)}", "send floating 0..1 or uint8 [B, H, W, 3 or 4]"
        )
    return shape
