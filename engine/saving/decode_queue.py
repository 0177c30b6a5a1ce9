"""The durable decode queue: what `submit` has accepted ends as one complete set of files, whatever is killed meanwhile.

This is the side that clients see; decode_worker.py does the work, in as many processes as share the spool.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Engine, func, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from torch import Tensor

from engine.private_files import make_private, make_private_folder
from engine.saving.database import open_database
from engine.saving.job_owner import living
from engine.saving.job_report import report
from engine.saving.job_store import JobStore, Limits, NewJob
from engine.saving.job_tables import SCHEMA, VERSION, VERSIONS
from luna_pictures.filenames import inside, room_below
from luna_pictures.plan import plan
from luna_protocol.blob import pack
from luna_protocol.errors import Broken, LunaError, Unavailable
from luna_protocol.save_job import (
    CancelJobs,
    JobsChanged,
    PurgeJobs,
    QueueReport,
    QueueStatus,
    RetryJobs,
    SaveAccepted,
    SaveJob,
)


class DecodeQueue:
    """The jobs of the spool folder `spool`, whose pictures go under `output`.

    Args:
        database: where the jobs are kept; SQLite in the spool folder by default.

    Attributes:
        submitted: is set whenever a job may be ready to be worked on.

    Raises:
        Broken: the jobs are of a newer LunaServe.
    """

    def __init__(self, spool: Path, output: Path, limits: Limits | None = None, database: str | None = None):
        make_private_folder(spool)
        for file in spool.glob("*.sqlite3*"):  # of a LunaServe that left them readable by others
            make_private(file)
        output.mkdir(parents=True, exist_ok=True)
        self.output = output.resolve()
        self.owners = spool / "owners"
        self.engine = open_database(database or f"sqlite:///{spool.resolve() / 'jobs.sqlite3'}", SCHEMA)
        _check_version(self.engine)
        self.store = JobStore(self.engine, limits or Limits(), lambda path: os.path.lexists(self.output / path))
        self.submitted = threading.Event()

    def submit(
        self, job: SaveJob, tensors: Mapping[str, Tensor], model: str = "", channels: int = 4, scale: int = 8
    ) -> SaveAccepted:
        """Accepts `job`: when this returns, it is on disk. Sent again, it gets the same reply.

        Args:
            model: which VAE is to decode it; only workers of that model take it.
            channels, scale: C of that VAE's latents [B, C, h, w], and pixels a side per latent position.

        Raises:
            Malformed, Impossible, TooLarge: it cannot be done.
            Unavailable: the queue or the disk is full.
        """
        files, told = plan(job, tensors, channels, scale, room_below(self.output))
        for file in {file.path.parent: file for file in files}.values():
            inside(self.output, file.path)
        blob = pack(job.model_copy(update={"references": {}}), tensors)
        new = NewJob(
            job_id=job.job_id,
            model=model,
            client=job.client,
            priority=job.priority,
            blob=blob,
            digest=hashlib.blake2b(blob, digest_size=16).hexdigest(),
            files=files,
            warnings=told,
        )
        try:
            reply = self.store.submit(new)
        except DBAPIError as error:
            raise Unavailable(
                f"the job cannot be written: {error.orig}", "see to the spool's disk or database", retry_after=10
            ) from error
        self.submitted.set()
        return reply

    def report(self, asked: QueueStatus) -> QueueReport:
        """The queue's figures, and the jobs that `asked` names."""
        return report(self.engine, asked, living(self.owners))

    def cancel(self, asked: CancelJobs) -> JobsChanged:
        """Cancels waiting, running and dead jobs; a running one ends without files."""
        return _each(asked.job_ids, self.store.cancel)

    def retry(self, asked: RetryJobs) -> JobsChanged:
        """Puts dead jobs back into the queue."""
        changed = _each(asked.job_ids or self.store.dead(), self.store.retry)
        self.submitted.set()
        return changed

    def purge(self, asked: PurgeJobs) -> JobsChanged:
        """Forgets finished jobs; their pictures stay."""
        gone = self.store.purge(asked.states, asked.older_than, asked.job_ids)
        kept = [job_id for job_id in asked.job_ids if job_id not in gone]
        return JobsChanged(changed=gone, unchanged=dict.fromkeys(kept, f"it is not {' or '.join(asked.states)}"))

    def close(self) -> None:
        self.engine.dispose()


def _check_version(engine: Engine) -> None:
    with suppress(IntegrityError), engine.begin() as db:  # which another process has written in the same instant
        version = db.scalar(select(func.max(VERSIONS.c.version)))
        if version is None:
            db.execute(insert(VERSIONS).values(version=VERSION))
        elif version > VERSION:
            raise Broken(
                f"{engine.url!r} has decode jobs of a newer LunaServe (version {version}; this one reads {VERSION})",
                "serve them with that one, or name another folder as LUNA_SPOOL",
            )


def _each(job_ids: list[str], change: Callable[[str], object]) -> JobsChanged:
    unchanged = {}
    for job_id in job_ids:
        try:
            change(job_id)
        except LunaError as error:
            unchanged[job_id] = error.message
    return JobsChanged(changed=[job_id for job_id in job_ids if job_id not in unchanged], unchanged=unchanged)
