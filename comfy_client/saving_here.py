"""A save job done in ComfyUI's own process: named and tagged as on the server, and whatever can be saved is."""

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from luna_pictures.encoding import encode
from luna_pictures.filenames import discarded, numbered, room_below
from luna_pictures.latent import EXTENSION, latent_file
from luna_pictures.metadata import workflow_texts
from luna_pictures.plan import finite_rows, nan_warnings, picture_path, picture_warnings, warnings
from luna_pictures.quality_gate import quality
from luna_protocol.errors import Impossible, LunaError
from luna_protocol.save_job import PictureGroup, SaveJob


def save_here(
    job: SaveJob, tensors: Mapping[str, Tensor], decode: Callable[[Tensor], Tensor], folders: Sequence[Path]
) -> tuple[list[str], list[str]]:
    """Saves a job's pictures, and as latents those that cannot be decoded: the files, and what is otherwise than asked.

    Heatmaps and database rows are the server's alone.

    Args:
        decode: latent [1, C, ...] to image [B, H, W, 3] in 0..1; a `LunaError` says that it cannot.
        folders: where to save: a file goes into the next one where it cannot be written to the first. Those of the
            first are returned as paths below it.

    Raises:
        Impossible: there is nothing that could be saved.
    """
    files, notes = [], warnings(job)
    room = room_below(folders[0])

    def save(what: str, make: Callable[[], tuple[PurePosixPath, bytes]]) -> None:
        try:
            file, failures = _write(folders, *make())
        except Exception as error:  # of one file: it must not cost the others
            notes.append(f"{what} is not saved: {error}")
        else:
            files.append(file)
            notes.extend(failures)

    for group in job.groups:
        tensor, undecoded = tensors[group.tensor], []
        several, finite = len(tensor) > 1 or tensor.ndim > 4, finite_rows(tensor)
        notes += nan_warnings(group, len(tensor), finite)
        for row in finite:
            single = tensor[row : row + 1]
            try:
                pictures = _pictures(group, row, single, decode)
            except LunaError as error:
                undecoded.append(single)
                notes.append(str(error))
                continue
            for number, picture in enumerate(pictures, row * len(pictures)):
                notes += picture_warnings(group, *picture.shape)
                shown = number if several else None
                save(f"row {number} of {group.tensor}", partial(_picture_file, job, group, picture, shown, room))
        if undecoded:
            save(f"what is left of {group.tensor}", partial(_latent_file, job, group, torch.cat(undecoded), room))
            notes.append("a .latent file holds what was not decoded: Load Latent finds it in ComfyUI's input folder")
    if not files:
        raise Impossible("nothing could be saved: " + "; ".join(dict.fromkeys(notes)))
    return files, list(dict.fromkeys(notes))


def _picture_file(
    job: SaveJob, group: PictureGroup, picture: np.ndarray, number: int | None, room: int
) -> tuple[PurePosixPath, bytes]:
    path = picture_path(job, group, number, picture.shape, room)
    score = quality(picture, job.quality_gate)
    rejected = score is not None and score < job.min_quality
    return discarded(path) if rejected else path, encode(picture, job, group, number or 0)


def _latent_file(job: SaveJob, group: PictureGroup, latent: Tensor, room: int) -> tuple[PurePosixPath, bytes]:
    height, width = (8 * side for side in latent.shape[-2:])
    path = picture_path(job, group, None, (height, width, 3), room)
    return path.with_suffix(EXTENSION), latent_file(latent, workflow_texts(job))


def _pictures(group: PictureGroup, row: int, single: Tensor, decode: Callable[[Tensor], Tensor]) -> list[np.ndarray]:
    """The pictures [H, W, C] of one batch row: one, or the frames of a video."""
    images = decode(single) if group.source == "latent" else single
    images = images.reshape(-1, *images.shape[-3:]).cpu()
    if len(finite_rows(images)) < len(images):
        raise Impossible(f"the VAE made NaN of row {row} of {group.tensor}", "fp16 overflows in some VAEs")
    return list((images if images.dtype == torch.uint8 else images.float()).numpy())


def _write(folders: Sequence[Path], path: PurePosixPath, content: bytes) -> tuple[str, list[str]]:
    """The new file, in the first folder that takes it, and why others did not.

    Raises:
        OSError: none does.
    """
    failures: list[str] = []
    for folder in folders:
        try:
            written = _write_new(folder, path, content)
        except OSError as error:
            failures.append(f"{folder} takes no pictures ({error.strerror or error})")
        else:
            if failures:
                failures.append(f"they are in {folder}, which ComfyUI empties: move them")
            return str(written if folder is folders[0] else folder / written), failures
    raise OSError("; ".join(failures))


def _write_new(folder: Path, wanted: PurePosixPath, content: bytes) -> PurePosixPath:
    """Writes a file called otherwise where there is one of that name already: an empty file holds the name until the
    whole one takes its place."""
    number = 0
    while True:
        path = numbered(wanted, number)
        final = folder / path
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
        return path
