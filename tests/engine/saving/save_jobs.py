"""Jobs for the tests of the decode queue, and how their files are checked."""

import hashlib
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from sqlalchemy import select
from torch import Tensor

from engine.saving.decode_queue import DecodeQueue
from engine.saving.picture_records import PICTURES, PictureRecords
from luna_protocol.save_job import JobStatus, PictureGroup, QueueStatus, SaveJob

_numbers = itertools.count()


def decode(latent: Tensor) -> Tensor:
    """Eight times as large, three of the channels: a decoder whose pictures can be told apart."""
    pixels = torch.nn.functional.interpolate(latent[:, :3].float(), scale_factor=8)
    return pixels.permute(0, 2, 3, 1)


def a_job(*formats: str, **fields) -> SaveJob:
    """A job of one latent per format, named latent0, latent1 ..., with an affix of its own."""
    groups = [
        PictureGroup(source="latent", tensor=f"latent{n}", affix=f"AFFIX{n}", format=name, subdir=n > 0)
        for n, name in enumerate(formats or ("png",))
    ]
    given = {"job_id": f"job-{next(_numbers):08d}", "groups": groups, "created": 1e9, "metadata": {"model": "a/b.x"}}
    return SaveJob(**(given | fields))


def latents(job: SaveJob, rows: int = 1, size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.tensor: torch.rand(rows, 4, size, size, generator=generator) for group in job.groups}


def wait_for(queue: DecodeQueue, job: SaveJob, *states: str, seconds: float = 30) -> JobStatus:
    """The job's status as soon as it is in one of `states`."""
    until = time.monotonic() + seconds
    while True:
        status = queue.report(QueueStatus(job_ids=[job.job_id])).jobs[0]
        if status.state in (states or ("done",)):
            return status
        assert time.monotonic() < until, f"still {status}"
        time.sleep(0.02)


def files_under(output: Path) -> set[str]:
    return {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}


def check_complete(output: Path, status: JobStatus) -> None:
    """Every file of a job is what the queue says it is, and can be read."""
    assert status.state == "done", status
    for file in status.files:
        content = (output / file.path).read_bytes()
        assert len(content) == file.bytes and hashlib.sha256(content).hexdigest() == file.sha256
        if file.kind == "picture":
            with Image.open(output / file.path) as image:
                image.load()
                assert image.size == (file.width, file.height)


def check_each_done_once(output: Path, queue: DecodeQueue, jobs: Sequence[SaveJob], database: str) -> None:
    """The queue has these jobs, of two rows a latent, and no other; each is one complete set of files; no other file is
    under `output`, and `database` has one record a picture."""
    statuses = {status.job_id: status for status in queue.report(QueueStatus(limit=1000)).jobs}
    assert set(statuses) == {job.job_id for job in jobs}
    for job in jobs:
        check_complete(output, statuses[job.job_id])
        assert len(statuses[job.job_id].files) == 2 * len(job.groups)
    paths = [file.path for status in statuses.values() for file in status.files]
    assert len(set(paths)) == len(paths)
    assert files_under(output) == set(paths), files_under(output) ^ set(paths)
    records = PictureRecords(database)
    with records.engine.connect() as db:
        assert sorted(db.scalars(select(PICTURES.c.path))) == sorted(paths)
    records.close()
