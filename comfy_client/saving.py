"""Save jobs as Luna Multi Saver makes them, and the same pictures saved by ComfyUI when the server cannot."""

import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from luna_pictures.encoding import encode, to_8_bits
from luna_pictures.filenames import discarded, inside, numbered
from luna_pictures.plan import plan
from luna_pictures.quality_gate import quality
from luna_protocol.errors import Malformed
from luna_protocol.save_job import Heatmap, PictureFormat, PictureGroup, SaveJob


@dataclass(frozen=True)
class Batch:
    """Pictures that one slot of the node saves: a latent [B, C, h, w] or an image [B, H, W, 3 or 4] in 0..1."""

    slot: int
    affix: str
    format: PictureFormat
    subdir: bool
    latent: Tensor | None = None
    image: Tensor | None = None


def job_of(
    batches: Sequence[Batch], heatmaps: Mapping[tuple[str, str], Tensor], **settings: Any
) -> tuple[SaveJob, dict[str, Tensor]]:
    """A new job and the tensors that go with it.

    Args:
        heatmaps: {(polarity, stage): [B, h, w]}.
        settings: `SaveJob`'s other fields.

    Raises:
        Malformed: there is nothing to save, or a slot has both a latent and an image.
    """
    if not batches:
        raise Malformed("there is nothing to save", "connect a latent or an image, and choose a format")
    groups, tensors = [], {}
    for batch in batches:
        if batch.latent is not None and batch.image is not None:
            raise Malformed(f"slot {batch.slot} has both a latent and an image", "connect one of them")
        name, source = f"pictures_{batch.slot}", "image" if batch.latent is None else "latent"
        groups.append(
            PictureGroup(source=source, tensor=name, affix=batch.affix, format=batch.format, subdir=batch.subdir)
        )
        tensors[name] = batch.latent.contiguous() if source == "latent" else _compact(batch)
    maps = []
    for (polarity, stage), tensor in heatmaps.items():
        maps.append(Heatmap(tensor=f"heatmap_{polarity}_{stage}", polarity=polarity, stage=stage))
        tensors[maps[-1].tensor] = tensor.contiguous()
    return SaveJob(job_id=uuid.uuid4().hex, groups=groups, heatmaps=maps, created=time.time(), **settings), tensors


def save_here(
    job: SaveJob, tensors: Mapping[str, Tensor], decode: Callable[[Tensor], Tensor], output: Path
) -> list[str]:
    """Saves a job's pictures in this process, named and tagged as the server would; their paths under `output`.

    Heatmaps and database rows are the server's alone.

    Args:
        decode: latent [B, C, h, w] to image [B, H, W, 3] in 0..1.

    Raises:
        Malformed, Impossible, TooLarge: as the server would.
        OSError: the disk is full, or the folder cannot be written.
    """
    job = job.model_copy(update={"heatmaps": []})
    tensors = {group.tensor: tensors[group.tensor] for group in job.groups}
    decoded = {
        group.tensor: decode(tensors[group.tensor]) if group.source == "latent" else tensors[group.tensor]
        for group in job.groups
    }
    shown = [group.model_copy(update={"source": "image"}) for group in job.groups]
    job, output = job.model_copy(update={"groups": shown}), output.resolve()
    saved = []
    for file in plan(job, decoded, latent_channels=0, latent_scale=1):
        group = job.groups[file.group]
        picture = decoded[group.tensor][file.row].cpu().numpy()
        score = quality(picture, job.quality_gate)
        path = discarded(file.path) if score is not None and score < job.min_quality else file.path
        saved.append(_write(output, path, encode(picture, job, group, file.row)))
    return saved


def _compact(batch: Batch) -> Tensor:
    """8 bits where the format keeps no more: a quarter of what travels."""
    if batch.format == "png16" or batch.image.dtype == torch.uint8 or not torch.isfinite(batch.image).all():
        return batch.image.contiguous()
    return torch.from_numpy(to_8_bits(batch.image.float().cpu().numpy()))


def _write(output: Path, wanted: PurePosixPath, content: bytes) -> str:
    """Writes a new file, called otherwise where there is one of that name already: an empty file holds the name until
    the whole one takes its place."""
    number = 0
    while True:
        path = numbered(wanted, number)
        final = inside(output, path)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            final.touch(exist_ok=False)
        except FileExistsError:
            number += 1
            continue
        part = final.with_name(f".{uuid.uuid4().hex}.part")
        try:
            part.write_bytes(content)
            os.replace(part, final)
        except BaseException:
            part.unlink(missing_ok=True)
            final.unlink(missing_ok=True)
            raise
        return str(path)
