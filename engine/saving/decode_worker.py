"""Works on the decode queue in threads of its process.

    claim -> decode (one thread, the device) -> encode and write (threads, the CPU) -> stage -> put in place -> finish

The next job is decoded while the former is encoded and written. A job belongs to the worker that claimed it, which
renews its lease however long the job takes, and goes to another when that worker dies (job_owner.py) or stands still.

Where a kill can hit, and what the next worker finds:
  before `submit` commits      nothing; the client was not told anything and sends the job again
  until `stage` commits        the job, and perhaps temporary files: they are removed and the job is done again
  until `finish` commits       complete temporary files, some under their final names by now: the rest is put in place
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Row
from torch import Tensor

from engine.saving.database import tidy
from engine.saving.decode_queue import DecodeQueue
from engine.saving.job_owner import Owner
from engine.saving.job_store import Claim, LostClaim
from engine.saving.job_work import Decoded, JobWork, Observe
from engine.saving.machine_faults import is_of_the_machine
from engine.saving.picture_records import PictureRecords
from engine.saving.watcher import Watcher
from luna_pictures.metadata import plain
from luna_protocol.errors import Impossible, LunaError, Malformed, TooLarge

log = logging.getLogger(__name__)

_POLL = 0.25  # seconds until a job is found that another process has accepted
_TEND = 1.0
_PURGE = 3600.0
_UNWRITTEN_BYTES = 1 << 30  # of decoded pictures, beyond which no other job is decoded before some are written


class DecodeWorker:
    """One of the workers of `queue`.

    Args:
        decode: latent [1, C, h, w] to images [1, H, W, 3] in 0..1; called from one thread.
        model: whose jobs to take, as given to `submit`.
        records: where `database_store` jobs write a row per picture.
        watcher: is told of every picture of such a job.
        writers: jobs being encoded and written at a time.
        observe: is called with a name (queue_wait, decode, write, total) and seconds, from any thread.
    """

    def __init__(
        self,
        queue: DecodeQueue,
        decode: Callable[[Tensor], Tensor],
        *,
        records: PictureRecords,
        model: str = "",
        watcher: Watcher | None = None,
        writers: int = 2,
        observe: Observe = lambda name, seconds: None,
    ):
        self._queue, self._store = queue, queue.store
        self._model = model
        self._observe = _harmless(observe)
        self._owner = Owner(queue.owners, model)
        self._mine: set[Claim] = set()
        self._claiming = threading.Lock()
        self._stopping, self._stopped = threading.Event(), threading.Event()
        self._free_writers = threading.Semaphore(writers)
        self._written, self._unwritten_bytes = threading.Condition(), 0
        self._writers = ThreadPoolExecutor(writers, thread_name_prefix="write")
        self._encoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="encode")
        self._work = JobWork(queue.store, queue.output, decode, self._encoders, records, watcher, self._observe)
        self._decoding = threading.Thread(target=self._run, name="decode", daemon=True)
        # Of its own: a decode may take longer than a lease.
        self._tending = threading.Thread(target=self._tend_always, name="tend", daemon=True)
        self._renewed = self._purged = -_PURGE
        self._untidy = False

    def start(self) -> None:
        self._tending.start()
        self._decoding.start()

    def stop(self) -> None:
        """Ends after the jobs at hand; waiting ones stay in the spool."""
        self._stopping.set()
        self._queue.submitted.set()
        if self._decoding.is_alive():
            self._decoding.join()
        self._writers.shutdown()
        self._encoders.shutdown()
        self._stopped.set()
        if self._tending.is_alive():
            self._tending.join()
        self._owner.release()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._written:
                    self._written.wait_for(lambda: self._unwritten_bytes <= _UNWRITTEN_BYTES)
                with self._claiming:
                    claim = self._store.claim(self._owner.id, self._model)
                    if claim is not None:
                        self._mine.add(claim)
                self._rest() if claim is None else self._begin(claim)
            except Exception:
                log.exception("the decode queue stumbled, and goes on")
                self._stopping.wait(_TEND)

    def _begin(self, claim: Claim) -> None:
        """Decodes, and leaves the rest to a writer."""
        decoded = None
        try:
            if not claim.staged:
                self._observe("queue_wait", time.time() - claim.submitted)
                decoded = self._work.decode(claim)
        except Exception as error:
            self._fail(claim, error)
        else:
            self._unwritten(decoded, 1)
            self._free_writers.acquire()
            self._writers.submit(self._end, claim, decoded)

    def _end(self, claim: Claim, decoded: Decoded | None) -> None:
        try:
            if decoded is None:
                self._work.put_in_place(claim, None, None)
            else:
                seconds = max(decoded.seconds, self._work.write(claim, decoded))
                self._work.put_in_place(claim, decoded.job, seconds)
        except Exception as error:
            self._fail(claim, error)
        else:
            self._mine.discard(claim)
        finally:
            self._untidy = True
            self._unwritten(decoded, -1)
            self._free_writers.release()

    def _unwritten(self, decoded: Decoded | None, sign: int) -> None:
        with self._written:
            self._unwritten_bytes += sign * (decoded.nbytes if decoded else 0)
            self._written.notify_all()

    def _fail(self, claim: Claim, error: Exception) -> None:
        try:
            self._tell_failure(claim, error)
        except Exception:
            # `_tend` finds it: a job that is this worker's and that it does not work on.
            log.exception("the failure of job %s could not be written down", claim.job_id)
        finally:
            self._mine.discard(claim)

    def _tell_failure(self, claim: Claim, error: Exception) -> None:
        if isinstance(error, LostClaim):
            log.info("job %s was cancelled or taken over", claim.job_id)
            return
        log.warning("job %s failed", claim.job_id, exc_info=error)
        reason = str(error) if isinstance(error, LunaError) else f"{type(error).__name__}: {error}"
        forever = isinstance(error, Malformed | Impossible | TooLarge)
        self._store.fail(claim, plain(reason), forever=forever, counts=not is_of_the_machine(error))

    def _tend_always(self) -> None:
        while True:
            try:
                self._tend()
            except Exception:
                log.exception("the decode queue's jobs were not looked after this time")
            if self._stopped.wait(min(_TEND, self._store.limits.lease / 4)):
                return

    def _tend(self) -> None:
        """Keeps this worker's jobs, takes over those whose workers are gone, and forgets old ones."""
        now = time.monotonic()
        # Before the jobs are read: whoever is dead by now claims no more of them.
        dead = self._owner.dead()
        with self._claiming:
            mine = set(self._mine)
            if mine and now > self._renewed + self._store.limits.lease / 4:
                self._store.renew(mine)
                self._renewed = now
            held = self._store.held()
        working = {(claim.number, claim.claim) for claim in mine}
        for row in held:
            if row.owner == self._owner.id:
                gone = (row.number, row.claim) not in working
            else:
                gone = row.owner in dead or row.lease_until < time.time()
            if gone:
                self._take_over(row)
        self._owner.forget(dead - {row.owner for row in held})
        if now > self._purged + _PURGE:
            self._purged = now
            self._store.purge(("done", "cancelled"), self._store.limits.keep)

    def _take_over(self, row: Row) -> None:
        try:
            if not row.staged:
                self._work.remove_parts(row.number, row.job_id, row.claim)
        except OSError as error:
            # One folder's trouble must not hold up the jobs of others.
            log.warning("job %s stays with its dead worker for now: %s", row.job_id, error)
        else:
            self._store.take_from_dead(row)

    def _rest(self) -> None:
        if self._untidy and not self._mine:
            self._untidy = False
            tidy(self._queue.engine)
        self._queue.submitted.wait(_POLL)
        self._queue.submitted.clear()


def _harmless(observe: Observe) -> Observe:
    """`observe`, whose own faults must not cost a picture."""

    def observed(name: str, seconds: float) -> None:
        try:
            observe(name, seconds)
        except Exception:
            log.exception("%s of %.3f s was not observed", name, seconds)

    return observed
