"""Runs a decode queue and kills it with SIGKILL before its n-th step that reaches the disk, for every n; run as a
script.

A step is a call of one of the C functions below, counted over all threads of the queue: between two of them nothing
that another process could see changes. Each run is a fork of one process that has imported everything.

    python -m tests.engine.saving.kill_points FOLDER FIRST STRIDE     prints one JSON object
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.job_store import Limits
from engine.saving.picture_records import PictureRecords
from luna_protocol.save_job import QueueStatus, SaveJob
from tests.engine.saving.save_jobs import a_job, check_complete, decode, files_under, latents

STEPS = {"fsync", "link", "unlink", "mkdir", "write", "commit"}
MAX_STEPS = 1000


class Killer:
    """Counts the steps of every thread, and kills the process before step number `last`."""

    def __init__(self, last: int):
        self.last, self.seen, self.lock = last, 0, threading.Lock()

    def __call__(self, _frame, event, function):
        if event == "c_call" and function.__name__ in STEPS:
            with self.lock:
                if self.seen == self.last:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.seen += 1


def jobs_of(first: str) -> list[SaveJob]:
    return [
        a_job("png", "webp", job_id=f"{first}-0000", filename="x", save_mode="database_store"),
        a_job("jpeg", job_id=f"{first}-0001", filename="x", quality_gate="variance", save_mode="database_store"),
    ]


def open_queue(home: Path) -> tuple[DecodeQueue, DecodeWorker]:
    queue = DecodeQueue(home / "spool", home / "output", Limits(attempts=3, backoff=0.01))
    records = PictureRecords(f"sqlite:///{home / 'pictures.sqlite3'}")
    return queue, DecodeWorker(queue, decode, records=records)


def submit_and_work(home: Path, jobs: list[SaveJob], told: int) -> None:
    """Writes the ids of accepted jobs to `told`, then works until all are done."""
    queue, worker = open_queue(home)
    for job in jobs:
        queue.submit(job, latents(job, seed=int(job.job_id[-1])))
        os.write(told, f"{job.job_id}\n".encode())
    worker.start()
    while queue.report(QueueStatus()).counts["done"] < len(jobs):
        time.sleep(0.005)
    worker.stop()


def in_a_fork(work, *arguments) -> int:
    """The status that the fork ended with: 0, or the signal's number negative."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(*arguments)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_run(home: Path, jobs: list[SaveJob], last: int, told: int) -> None:
    killer = Killer(last)
    threading.setprofile(killer)
    sys.setprofile(killer)
    submit_and_work(home, jobs, told)


def check(home: Path, accepted: list[str], jobs: list[SaveJob]) -> None:
    """Whatever the killed run left, the next worker makes of it what was accepted and nothing else."""
    queue, worker = open_queue(home)
    worker.start()
    until = time.monotonic() + 60
    while (report := queue.report(QueueStatus())).counts["queued"] + report.counts["running"]:
        assert time.monotonic() < until, report
        time.sleep(0.005)
    known = {status.job_id: status for status in queue.report(QueueStatus()).jobs}
    assert set(accepted) <= set(known), f"accepted {accepted}, found {sorted(known)}"
    for job in jobs:
        queue.submit(job, latents(job, seed=int(job.job_id[-1])))
    while queue.report(QueueStatus()).counts["done"] < len(jobs):
        assert time.monotonic() < until, queue.report(QueueStatus())
        time.sleep(0.005)
    statuses = queue.report(QueueStatus()).jobs
    for status in statuses:
        check_complete(home / "output", status)
    expected = {file.path for status in statuses for file in status.files}
    assert files_under(home / "output") == expected, files_under(home / "output") ^ expected
    worker.stop()
    with PictureRecords(f"sqlite:///{home / 'pictures.sqlite3'}").engine.connect() as db:
        rows = db.exec_driver_sql("SELECT path, sha256 FROM luna_pictures").all()
    assert sorted(rows) == sorted((file.path, file.sha256) for status in statuses for file in status.files)


def main(folder: Path, last: int, stride: int) -> None:
    failures, killed = [], 0
    while last < MAX_STEPS:
        home = folder / f"step{last:04d}"
        home.mkdir()
        jobs = jobs_of(f"step{last:04d}")
        reading, writing = os.pipe()
        status = in_a_fork(killed_run, home, jobs, last, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            accepted = pipe.read().split()
        killed += status == -signal.SIGKILL
        if in_a_fork(check, home, accepted, jobs):
            failures.append(last)
        if status == 0:
            break
        last += stride
    print(json.dumps({"killed": killed, "last": last, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
