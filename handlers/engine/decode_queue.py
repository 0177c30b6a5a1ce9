"""The durable decode queue: what `submit` has accepted ends as one complete set of files, whatever is killed meanwhile.

    submit -> [database] -> decode (one thread, the device) -> encode and write (threads, the CPU) -> put in place ->
    done

The next job is decoded while the former is encoded and written. Several processes, also on several devices, share one
spool; each job belongs to the one that claimed it, and goes to another when that one dies (job_owner.py) or its lease
ends.

Where a kill can hit, and what the next worker finds:
  before `submit` commits      nothing; the client was not told anything and sends the job again
  until `stage` commits        the job, and perhaps temporary files: they are removed and the job is done again
  until `finish` commits       complete temporary files, some under their final names by now: the rest is put in place
"""

import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy.exc import DBAPIError
from torch import Tensor

from handlers.engine.database import open_database, tidy
from handlers.engine.filenames import inside
from handlers.engine.job_owner import Owner
from handlers.engine.job_report import report
from handlers.engine.job_store import Claim, JobStore, Limits, LostClaim, NewJob
from handlers.engine.job_tables import SCHEMA
from handlers.engine.job_work import Decoded, JobWork, Observe
from handlers.engine.picture_records import PictureRecords
from handlers.engine.save_plan import plan, warnings
from handlers.engine.watcher import Watcher
from protocol.blob import pack
from protocol.errors import Impossible, LunaError, Malformed, NotFound, TooLarge, Unavailable
from protocol.save_job import (
    CancelJobs,
    JobsChanged,
    PurgeJobs,
    QueueReport,
    QueueStatus,
    RetryJobs,
    SaveAccepted,
    SaveJob,
)

log = logging.getLogger(__name__)

_POLL = 0.25
_TEND = 1.0
_PURGE = 3600.0


class DecodeQueue:
    """Jobs of the spool folder `spool`, saved under `output`.

    Args:
        decode: latent [B, C, h, w] to images [B, H, W, 3] in 0..1; called from one thread.
        latent_channels, latent_scale: C, and H / h.
        database: where the jobs are kept; SQLite in the spool folder by default.
        records: where `database_store` jobs write a row per picture.
        watcher: is told of every picture of such a job.
        writers: jobs being encoded and written at a time.
        observe: is called with a name (queue_wait, decode, write, total) and seconds, from any thread.
    """

    def __init__(
        self,
        spool: Path,
        output: Path,
        decode: Callable[[Tensor], Tensor],
        *,
        latent_channels: int = 4,
        latent_scale: int = 8,
        limits: Limits | None = None,
        database: str | None = None,
        records: PictureRecords | None = None,
        watcher: Watcher | None = None,
        writers: int = 2,
        observe: Observe = lambda name, seconds: None,
    ):
        spool.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        self._output = output = output.resolve()
        self._latent = (latent_channels, latent_scale)
        self._observe = observe
        self._records = records
        self._engine = open_database(database or f"sqlite:///{spool.resolve() / 'jobs.sqlite3'}", SCHEMA)
        self._store = JobStore(self._engine, limits or Limits(), lambda path: os.path.lexists(output / path))
        self._owner = Owner(spool / "owners")
        self._mine: set[int] = set()
        self._wake, self._stopping = threading.Event(), threading.Event()
        # One job more than writers: the one that is being decoded.
        self._room = threading.Semaphore(writers + 1)
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="write")
        self._encoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="encode")
        self._job = JobWork(self._store, output, decode, self._encoders, records, watcher, observe)
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._tended = self._purged = -_PURGE
        self._untidy = False

    def submit(self, job: SaveJob, tensors: Mapping[str, Tensor]) -> SaveAccepted:
        """Accepts `job`: when this returns, it is on disk. Sent again, it gets the same reply.

        Raises:
            Malformed, Impossible, TooLarge: it cannot be done.
            Unavailable: the queue or the disk is full.
        """
        if job.save_mode == "database_store" and self._records is None:
            raise Impossible("this server keeps no records", "choose save_mode daemon, or configure a database")
        files = plan(job, tensors, *self._latent)
        for file in {file.path.parent: file for file in files}.values():
            inside(self._output, file.path)
        blob = pack(job.model_copy(update={"references": {}}), tensors)
        digest = hashlib.blake2b(blob, digest_size=16).hexdigest()
        try:
            reply = self._store.submit(NewJob(job.job_id, job.client, job.priority, blob, digest, files, warnings(job)))
        except DBAPIError as error:
            raise Unavailable(
                f"the job cannot be written: {error.orig}", "see to the spool's disk or database", retry_after=10
            ) from error
        self._wake.set()
        return reply

    def report(self, asked: QueueStatus) -> QueueReport:
        """The queue's figures, and the jobs that `asked` names."""
        workers = 1 + sum(not self._owner.is_dead(other) for other in self._owner.others())
        return report(self._engine, asked, workers)

    def cancel(self, asked: CancelJobs) -> JobsChanged:
        """Cancels waiting, running and dead jobs; a running one ends without files."""

        def cancel(job_id: str) -> None:
            row = self._store.cancel(job_id)
            if row.owner is None:
                self._job.remove_parts(row.number, row.job_id, row.claim)

        return _each(asked.job_ids, cancel)

    def retry(self, asked: RetryJobs) -> JobsChanged:
        """Puts dead jobs back into the queue."""
        changed = _each(asked.job_ids, self._store.retry)
        self._wake.set()
        return changed

    def purge(self, asked: PurgeJobs) -> JobsChanged:
        """Forgets finished jobs; their pictures stay."""
        gone = self._store.purge(asked.states, asked.older_than, asked.job_ids)
        kept = [job_id for job_id in asked.job_ids if job_id not in gone]
        return JobsChanged(changed=gone, unchanged=dict.fromkeys(kept, f"it is not {' or '.join(asked.states)}"))

    def start(self) -> None:
        """Begins to work; until then jobs are only accepted."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the jobs at hand; waiting ones stay in the spool."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._writers.shutdown()
        self._encoders.shutdown()
        self._owner.release()
        self._engine.dispose()

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._room.acquire()
            try:
                self._tend()
                claim = self._store.claim(self._owner.id)
            except Exception:
                self._room.release()
                log.exception("the queue's database does not answer; trying again")
                self._stopping.wait(1.0)
                continue
            if claim is None:
                self._room.release()
                self._rest()
            else:
                self._mine.add(claim.number)
                self._begin(claim)

    def _begin(self, claim: Claim) -> None:
        """Decodes, and leaves the rest to a writer."""
        decoded = None
        try:
            if not claim.staged:
                self._observe("queue_wait", time.time() - claim.submitted)
                if claim.claim > 1:
                    self._job.remove_parts(claim.number, claim.job_id, claim.claim)
                decoded = self._job.decode(claim)
        except Exception as error:
            self._fail(claim, error)
            self._let_go(claim)
        else:
            self._writers.submit(self._end, claim, decoded)

    def _end(self, claim: Claim, decoded: Decoded | None) -> None:
        try:
            if decoded is None:
                self._job.put_in_place(claim, None, None)
            else:
                seconds = max(decoded.seconds, self._job.write(claim, decoded))
                self._job.put_in_place(claim, decoded.job, seconds)
        except Exception as error:
            self._fail(claim, error)
        finally:
            self._let_go(claim)

    def _let_go(self, claim: Claim) -> None:
        self._mine.discard(claim.number)
        self._untidy = True
        self._room.release()
        self._wake.set()

    def _fail(self, claim: Claim, error: Exception) -> None:
        if isinstance(error, LostClaim):
            log.info("job %s was cancelled or taken over", claim.job_id)
            return
        log.warning("job %s failed", claim.job_id, exc_info=error)
        reason = str(error) if isinstance(error, LunaError) else f"{type(error).__name__}: {error}"
        try:
            self._store.fail(
                claim,
                reason,
                forever=isinstance(error, (Malformed, Impossible, TooLarge)),
                counts=not _is_of_the_machine(error),
            )
        except (LostClaim, DBAPIError):
            # `_tend` finds it: a job that is this worker's and that it does not work on.
            log.exception("the failure of job %s could not be written down", claim.job_id)

    def _tend(self) -> None:
        """Takes jobs over whose workers are gone, and forgets old ones."""
        now = time.monotonic()
        if now < self._tended + _TEND:
            return
        self._tended = now
        mine = set(self._mine)
        held = self._store.owned()
        for row in held:
            if row.owner == self._owner.id:
                gone = row.number not in mine
            else:
                gone = self._owner.is_dead(row.owner) or row.lease_until < time.time()
            if gone:
                if not row.staged:
                    self._job.remove_parts(row.number, row.job_id, row.claim)
                self._store.take_from_dead(row)
        for other in set(self._owner.others()) - {row.owner for row in held}:
            if self._owner.is_dead(other):
                self._owner.forget(other)
        if now > self._purged + _PURGE:
            self._purged = now
            self._store.purge(("done", "cancelled"), self._store.limits.keep)

    def _rest(self) -> None:
        if self._untidy and not self._mine:
            self._untidy = False
            tidy(self._engine)
        self._wake.wait(_POLL)
        self._wake.clear()


def _is_of_the_machine(error: Exception) -> bool:
    """Disk full, database gone: no fault of the job, which waits as long as it takes."""
    return isinstance(error, DBAPIError) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))


def _each(job_ids: list[str], change: Callable[[str], object]) -> JobsChanged:
    unchanged = {}
    for job_id in job_ids:
        try:
            change(job_id)
        except (NotFound, Malformed) as error:
            unchanged[job_id] = error.message
    return JobsChanged(changed=[job_id for job_id in job_ids if job_id not in unchanged], unchanged=unchanged)
