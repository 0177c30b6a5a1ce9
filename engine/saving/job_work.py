"""What is done with one job that a worker has claimed: decode, encode and write, put in place."""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import safetensors.torch
import torch
from sqlalchemy import Row
from torch import Tensor

from engine.saving.durable_files import holds, put_in_place, write_part
from engine.saving.job_store import Claim, JobStore, StagedFile
from engine.saving.picture_records import PictureRecords
from engine.saving.watcher import Watcher
from luna_pictures.encoding import encode, thumbnail
from luna_pictures.filenames import DISCARDED, discarded, inside
from luna_pictures.latent import EXTENSION, latent_file
from luna_pictures.metadata import workflow_texts
from luna_pictures.plan import finite_rows
from luna_pictures.quality_gate import quality
from luna_protocol.blob import unpack
from luna_protocol.errors import Impossible
from luna_protocol.save_job import PictureGroup, SaveJob

Observe = Callable[[str, float], None]


@dataclass
class Decoded:
    """A job's pictures in memory: arrays [H, W, 3 or 4], floating 0..1 or uint8, in the order of its file rows; or the
    latent [1, C, h, w] of which the VAE made NaN."""

    job: SaveJob
    pictures: list[tuple[PictureGroup, int, np.ndarray | Tensor]]
    heatmaps: Mapping[str, Tensor]
    seconds: float

    @property
    def nbytes(self) -> int:
        return sum(picture.nbytes for _, _, picture in self.pictures)


class JobWork:
    """The steps from a claim to complete files under `output`; see `DecodeWorker` for the arguments."""

    def __init__(
        self,
        store: JobStore,
        output: Path,
        decode: Callable[[Tensor], Tensor],
        encoders: Executor,
        records: PictureRecords,
        watcher: Watcher | None,
        observe: Observe,
    ):
        self._store = store
        self._output = output
        self._decode = decode
        self._encoders = encoders
        self._records, self._watcher, self._observe = records, watcher, observe
        self._disk_failed = False

    def decode(self, claim: Claim) -> Decoded:
        """The pictures of a job.

        Raises:
            LostClaim: the job was cancelled.
            Impossible: the VAE gave nothing but NaN.
            OSError: the last job could not be written, and no more can this one.
        """
        job, tensors = self._load(claim)
        if self._disk_failed:
            # Or a thousand jobs that wait for their disk would keep the device busy with decodes that come to nothing.
            try:
                for folder in {PurePosixPath(file.path).parent for file in self._store.files(claim.number)}:
                    self._write(claim, -1, folder / "x", b"x")
            finally:
                self.remove_parts(claim.number, claim.job_id, claim.claim)
        begun = time.monotonic()
        pictures = []
        for group in job.groups:
            tensor = tensors[group.tensor]
            # One by one: a batch of large pictures would take the memory of all of them at once, twice if joined.
            for row in finite_rows(tensor):
                given = tensor[row : row + 1]
                images = _on_cpu(self._decode(given) if group.source == "latent" else given)
                if len(images) != 1:
                    raise Impossible(f"the VAE made {len(images)} pictures of {group.tensor}", "1 was due")
                pictures.append((group, row, images[0] if np.isfinite(images).all() else given))
        if all(isinstance(picture, Tensor) for _, _, picture in pictures):
            raise Impossible(
                "the VAE made NaN of every latent", "fp16 overflows in some VAEs: serve this one as bf16 or fp32"
            )
        seconds = time.monotonic() - begun
        self._observe("decode", seconds)
        return Decoded(job, pictures, {part.tensor: tensors[part.tensor] for part in job.heatmaps}, seconds)

    def write(self, claim: Claim, decoded: Decoded) -> float:
        """Encodes and writes all files under temporary names and stages the job; the seconds that took.

        Raises:
            LostClaim, OSError: nothing of it is left on disk.
        """
        begun = time.monotonic()
        if claim.claim > 1:
            # A disk that failed may not have let the claim before remove its own.
            self.remove_parts(claim.number, claim.job_id, claim.claim - 1)
        files = self._store.files(claim.number)
        heatmaps = [files.pop()] if decoded.heatmaps else []
        tasks = [
            self._encoders.submit(self._write_picture, claim, decoded.job, file, *picture)
            for file, picture in zip(files, decoded.pictures, strict=True)
        ]
        tasks += [self._encoders.submit(self._write_heatmaps, claim, decoded, file) for file in heatmaps]
        wait(tasks)
        try:
            self._store.stage(claim, [task.result() for task in tasks])
            self._disk_failed = False
        except BaseException as error:
            self._disk_failed = isinstance(error, OSError)
            self.remove_parts(claim.number, claim.job_id, claim.claim)
            raise
        seconds = time.monotonic() - begun
        self._observe("write", seconds)
        return seconds

    def put_in_place(self, claim: Claim, job: SaveJob | None, seconds: float | None) -> None:
        """Gives every file of a staged job its final name, writes its records, and finishes it; may be repeated.

        Args:
            job: as `decode` gave it; None reads it from the spool.
            seconds: for `JobStore.finish`.

        Raises:
            FileNotFoundError: a complete file was removed before it got its name; the job is to be done again.
        """
        job = job or self._load(claim)[0]
        files = self._store.files(claim.number)
        try:
            for file in files:
                self._put_in_place(claim, file)
        except FileNotFoundError:
            self._take_back(files)
            self._store.unstage(claim)
            raise
        recorded = job.save_mode == "database_store"
        if recorded:
            self._record(claim, job)
        latents = [file.path for file in files if file.path.endswith(EXTENSION)]
        self._store.finish(claim, seconds, f"the VAE made NaN of {', '.join(latents)}" if latents else "")
        self._observe("total", time.time() - claim.submitted)
        if recorded and self._watcher is not None:
            self._tell_watcher(claim, job)

    def remove_parts(self, number: int, job_id: str, claim: int) -> None:
        """Removes temporary files that claims up to `claim` have left."""
        folders = {PurePosixPath(file.path).parent for file in self._store.files(number)}
        for folder in folders | {folder / DISCARDED for folder in folders}:
            for part in (self._output / folder).glob(f".{job_id}.*.part"):
                if int(part.name.split(".")[2]) <= claim:
                    # On Windows a file that its writer has open stays, and its writer removes it.
                    with suppress(OSError):
                        part.unlink()

    def _load(self, claim: Claim) -> tuple[SaveJob, dict[str, Tensor]]:
        message, tensors = unpack(self._store.payload(claim))
        # What this version of SaveJob does not know any more is of a LunaServe that accepted the job before an upgrade.
        return SaveJob.model_validate(message, extra="ignore"), tensors

    def _write_picture(
        self, claim: Claim, job: SaveJob, file: Row, group: PictureGroup, row: int, picture: np.ndarray | Tensor
    ) -> StagedFile:
        if isinstance(picture, Tensor):
            path = PurePosixPath(file.path).with_suffix(EXTENSION)
            return self._write(claim, file.position, path, latent_file(picture, workflow_texts(job)))
        if picture.shape[:2] != (file.height, file.width):
            raise Impossible(f"the VAE made {picture.shape} of {group.tensor}", f"{file.height} x {file.width} was due")
        score = quality(picture, job.quality_gate)
        rejected = score is not None and score < job.min_quality
        path = discarded(PurePosixPath(file.path)) if rejected else PurePosixPath(file.path)
        return self._write(
            claim, file.position, path, encode(picture, job, group, row), rejected, score, thumbnail(picture)
        )

    def _write_heatmaps(self, claim: Claim, decoded: Decoded, file: Row) -> StagedFile:
        told = json.dumps([part.model_dump() for part in decoded.job.heatmaps])
        tensors = {name: tensor.contiguous() for name, tensor in decoded.heatmaps.items()}
        content = safetensors.torch.save(tensors, {"heatmaps": told})
        return self._write(claim, file.position, PurePosixPath(file.path), content)

    def _write(self, claim: Claim, position: int, path: PurePosixPath, content: bytes, *told: object) -> StagedFile:
        part = path.parent / f".{claim.job_id}.{claim.claim}.{position}.part"
        sha256 = write_part(inside(self._output, part), content)
        return StagedFile(position, path, part, sha256, len(content), *told)

    def _put_in_place(self, claim: Claim, file: Row) -> None:
        part, path = inside(self._output, PurePosixPath(file.part)), PurePosixPath(file.path)
        while True:
            try:
                return put_in_place(part, inside(self._output, path), file.sha256)
            except FileExistsError:
                path = self._store.rename(claim, file.position)

    def _take_back(self, files: list[Row]) -> None:
        """Removes what a staged job has on disk; a file that somebody changed is no longer the job's."""
        for file in files:
            inside(self._output, PurePosixPath(file.part)).unlink(missing_ok=True)
            final = inside(self._output, PurePosixPath(file.path))
            if holds(final, file.sha256):
                final.unlink()

    def _record(self, claim: Claim, job: SaveJob) -> None:
        rows = self._store.files(claim.number)
        pictures = [file for file in rows if _is_picture(file)]
        heatmaps = [file.path for file in rows if file.kind == "heatmaps"]
        self._records.store(job, pictures, heatmaps[0] if heatmaps else None)

    def _tell_watcher(self, claim: Claim, job: SaveJob) -> None:
        # The record has the metadata already; what a watcher may add is its own analysis of the picture.
        flags = {"skip_metadata": True, "run_ai_only": True}
        for file in self._store.files(claim.number):
            if _is_picture(file) and not file.discarded:
                event = {"event": "picture_saved", "job_id": job.job_id, "path": file.path, "sha256": file.sha256}
                self._watcher.tell(event | flags)


def _is_picture(file: Row) -> bool:
    return file.kind == "picture" and not file.path.endswith(EXTENSION)


def _on_cpu(images: Tensor) -> np.ndarray:
    images = images.detach()
    return (images if images.dtype == torch.uint8 else images.float()).cpu().numpy()
