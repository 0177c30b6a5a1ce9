"""Save jobs as Luna Multi Saver makes them."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comfy_client.job_fields import tolerant_job
from luna_pictures.encoding import to_8_bits
from luna_pictures.filenames import check_template, contained
from luna_pictures.metadata import plain
from luna_protocol.errors import Malformed
from luna_protocol.save_job import MAX_AFFIX, Heatmap, PictureFormat, PictureGroup, SaveJob


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
) -> tuple[SaveJob, dict[str, Tensor], list[str]]:
    """A new job, the tensors that go with it, and what had to be made otherwise than asked for a job to come of it.

    Args:
        heatmaps: {(polarity, stage): [B, h, w]}.
        settings: `SaveJob`'s other fields.

    Raises:
        Malformed: there is nothing to save.
    """
    if not batches:
        raise Malformed("there is nothing to save", "connect a latent or an image, and choose a format")
    groups, tensors, notes = [], {}, []
    for batch in batches:
        source = "image" if batch.latent is None else "latent"
        name, affix = f"{source}_{batch.slot}", plain(str(batch.affix))
        if len(affix) > MAX_AFFIX:
            notes.append(f"affix_{batch.slot} has {len(affix)} characters and is cut to {MAX_AFFIX}")
        groups.append(
            PictureGroup(source=source, tensor=name, affix=affix[:MAX_AFFIX], format=batch.format, subdir=batch.subdir)
        )
        tensors[name] = batch.latent.contiguous() if source == "latent" else _compact(batch, notes)
    maps = []
    for (polarity, stage), tensor in heatmaps.items():
        maps.append(Heatmap(tensor=f"heatmap_{polarity}_{stage}", polarity=polarity, stage=stage))
        tensors[maps[-1].tensor] = tensor.contiguous()
    for field in settings.keys() & {"save_path", "filename"}:
        try:
            check_template(str(settings[field]))
        except Malformed as error:
            settings[field] = contained(str(settings[field]))
            notes.append(f"{error}: it is taken for {settings[field]!r}")
    own = {"job_id": uuid.uuid4().hex, "groups": groups, "heatmaps": maps, "created": time.time()}
    job, left_out = tolerant_job(settings | own)
    return job, tensors, notes + left_out


def _compact(batch: Batch, notes: list[str]) -> Tensor:
    """The image as every format takes it, in 8 bits where the format keeps no more: a quarter of what travels."""
    image = batch.image if batch.image.ndim == 4 else batch.image[None]
    if image.shape[-1] == 1:
        image = image.expand(*image.shape[:-1], 3)
    finite = torch.isfinite(image).flatten(1)
    if (partly := finite.any(1) & ~finite.all(1)).any():
        notes.append(f"image_{batch.slot} holds NaN or infinity here and there, which is saved as black or white")
        image = torch.where(partly.view(-1, 1, 1, 1), image.nan_to_num(0.0, 1.0, 0.0), image)
    if batch.format == "png16" or image.dtype == torch.uint8 or not torch.isfinite(image).all():
        return image.contiguous()
    return torch.from_numpy(to_8_bits(image.float().cpu().numpy()))
