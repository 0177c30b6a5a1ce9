"""What the machine does to a job costs time, never the job; what is wrong with the job itself ends it."""

import errno
import os
import subprocess
import sys
import time

import pytest
import torch

from engine.saving import decode_worker, decoding, job_work
from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.job_store import Limits
from engine.saving.picture_records import PictureRecords
from luna_protocol.errors import Impossible, Internal, OutOfMemory, Unavailable
from luna_protocol.save_job import QueueStatus
from tests.engine.saving.save_jobs import a_job, check_complete, decode, files_under, latents, wait_for
from tests.engine.saving.small_disk import small_disk

ATTEMPTS = 2
# Of many jobs: pauses in which each of them has its turn, too.
IN_TURN = Limits(attempts=ATTEMPTS, backoff=0.2, backoff_cap=1.0)
FAST = Limits(attempts=ATTEMPTS, backoff=0.02, backoff_cap=0.05)


class Failing:
    """A call that raises `error` while it is set, and counts that."""

    def __init__(self, call, error):
        self.call, self.error, self.failures = call, error, 0

    def __call__(self, *arguments):
        if self.error is None:
            return self.call(*arguments)
        self.failures += 1
        raise self.error


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Starts a worker on `tmp_path`, or `output`, and ends it."""
    monkeypatch.setattr(decode_worker, "_POLL", 0.01)
    running = []

    def run(decode=decode, output=tmp_path / "output", limits=FAST) -> DecodeQueue:
        queue = DecodeQueue(tmp_path / "spool", output, limits)
        records = PictureRecords(f"sqlite:///{tmp_path / 'pictures.sqlite3'}")
        worker = DecodeWorker(queue, decode, records=records)
        worker.start()
        running.append((worker, queue, records))
        return queue

    yield run
    for each in running:
        each[0].stop()
        each[1].close()
        each[2].close()


def until_failed(failing: Failing, times: int) -> None:
    until = time.monotonic() + 30
    while failing.failures < times:
        assert time.monotonic() < until
        time.sleep(0.01)


def until_all_wait_for(queue: DecodeQueue, jobs, reason: str) -> None:
    until = time.monotonic() + 30
    while not all(reason in status_of(queue, job).reason for job in jobs):
        assert time.monotonic() < until
        time.sleep(0.02)


def status_of(queue, job):
    return queue.report(QueueStatus(job_ids=[job.job_id])).jobs[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 3.00 GiB"),
        OutOfMemory("cuda:0 has no memory left for this"),
        Unavailable("the model is loading"),
        Internal("RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_a_device_in_trouble_costs_no_attempt(run, tmp_path, error):
    failing = Failing(decode, error)
    queue = run(failing)
    queue.submit(job := a_job(), latents(job))
    until_failed(failing, ATTEMPTS + 1)
    status = status_of(queue, job)
    assert status.state in ("queued", "running") and status.attempts <= 1
    assert str(error) in status.reason
    failing.error = None
    status = wait_for(queue, job)
    check_complete(tmp_path / "output", status)
    assert status.attempts == 1


@pytest.mark.parametrize("number", ["EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENOSPC", "EDQUOT", "ENOENT"])
def test_a_disk_in_trouble_costs_no_attempt(run, tmp_path, monkeypatch, number):
    code = getattr(errno, number, None)
    if code is None:
        pytest.skip(f"{number} is not of this system")
    failing = Failing(job_work.write_part, OSError(code, os.strerror(code)))
    monkeypatch.setattr(job_work, "write_part", failing)
    queue = run()
    queue.submit(job := a_job(), latents(job))
    until_failed(failing, ATTEMPTS + 1)
    status = status_of(queue, job)
    assert status.state in ("queued", "running") and os.strerror(code) in status.reason
    failing.error = None
    check_complete(tmp_path / "output", wait_for(queue, job))


def test_an_output_folder_that_turned_read_only_costs_no_job(run, tmp_path):
    with small_disk(tmp_path / "output", megabytes=4) as output:
        remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", output], check=True)  # noqa: E731
        remount("ro")
        queue = run(output=output, limits=IN_TURN)
        jobs = [a_job("png", filename="a folder/x") for _ in range(5)]
        for job in jobs:
            queue.submit(job, latents(job))
        until_all_wait_for(queue, jobs, "Read-only")
        time.sleep(0.5)
        assert queue.report(QueueStatus()).counts["dead"] == 0
        remount("rw")
        for job in jobs:
            check_complete(output, wait_for(queue, job))
        assert len(files_under(output)) == len(jobs)


def test_the_pauses_of_a_waiting_job_grow(run):
    failing = Failing(decode, MemoryError("full"))
    queue = run(failing)
    queue.submit(job := a_job(), latents(job))
    queue.store.limits = Limits(attempts=ATTEMPTS, backoff=0.02)
    until_failed(failing, 5)
    time.sleep(0.1)
    status = status_of(queue, job)
    assert status.state == "queued" and 0 < status.retry_in <= 0.02 * 2**failing.failures


def test_a_device_is_not_kept_busy_with_pictures_that_no_disk_takes(run, tmp_path, monkeypatch):
    failing, decodes = Failing(job_work.write_part, OSError(errno.EROFS, "Read-only file system")), []
    monkeypatch.setattr(job_work, "write_part", failing)
    queue = run(lambda latent: decodes.append(1) or decode(latent), limits=IN_TURN)
    jobs = [a_job() for _ in range(8)]
    for job in jobs:
        queue.submit(job, latents(job))
    until_all_wait_for(queue, jobs, "Read-only")
    time.sleep(0.5)
    assert len(decodes) <= 4, "those begun before the first failure was known"
    failing.error = None
    for job in jobs:
        check_complete(tmp_path / "output", wait_for(queue, job))
    assert files_under(tmp_path / "output") == {file.path for job in jobs for file in status_of(queue, job).files}


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (Impossible("the VAE made NaN"), 1),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ATTEMPTS),
        (RuntimeError("Expected all tensors to be on the same device, cuda:0 and cpu"), ATTEMPTS),
        (ValueError("bad"), ATTEMPTS),
        (OSError("encoder error -2 when writing image file"), ATTEMPTS),
        (OSError(errno.ENAMETOOLONG, "File name too long"), ATTEMPTS),
        (OSError(errno.ENOTDIR, "Not a directory"), ATTEMPTS),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_the_job_ends_it(run, error, attempts):
    queue = run(Failing(decode, error))
    queue.submit(job := a_job(), latents(job))
    status = wait_for(queue, job, "dead")
    assert status.attempts == attempts and str(error) in status.reason


def test_parts_that_a_failed_disk_kept_are_removed_with_the_next_try(run, tmp_path, monkeypatch):
    write_part = job_work.write_part

    def half(part, content):
        write_part(part, content)
        raise OSError(errno.EROFS, "Read-only file system")

    failing = Failing(write_part, None)
    monkeypatch.setattr(job_work, "write_part", half)
    with monkeypatch.context() as frozen:
        frozen.setattr(job_work.Path, "unlink", Failing(None, OSError(errno.EROFS, "Read-only file system")))
        queue = run()
        queue.submit(job := a_job(), latents(job))
        until = time.monotonic() + 30
        while not list((tmp_path / "output").rglob("*.part")):
            assert time.monotonic() < until
            time.sleep(0.01)
    monkeypatch.setattr(job_work, "write_part", failing)
    status = wait_for(queue, job)
    assert files_under(tmp_path / "output") == {file.path for file in status.files}


class SmallDevice:
    """A VAE on a device that has room for tiles only; `held` says whether an error still holds a decode's tensors."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, has_room_for_tiles=True):
        self.room, self.calls, self.held = has_room_for_tiles, [], False

    def decode(self, row, tiling=None):
        self.calls.append(tiling)
        self.held = sys.exc_info()[0] is not None
        if tiling is None or not self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.interpolate(row[:, :3], scale_factor=8)


def test_no_memory_for_a_whole_picture_means_tiles_without_what_the_first_try_held():
    vae = SmallDevice()
    images = decoding.decode_picture(vae, latent := torch.rand(1, 4, 4, 6), whole_pixels=1 << 20)
    assert images.shape == (1, 32, 48, 3) and vae.calls == [None, decoding.TILES] and not vae.held
    assert torch.equal(images, (decode(latent) + 1) / 2)


def test_no_memory_for_tiles_either_is_reported_as_such():
    with pytest.raises(torch.OutOfMemoryError):
        decoding.decode_picture(SmallDevice(has_room_for_tiles=False), torch.rand(1, 4, 4, 4), whole_pixels=0)
