"""Jobs in a database: SQLite in the spool folder, or PostgreSQL by URL.

A job is accepted when one transaction has written its tensors, its row and its files' names; nothing else has to
agree with it. Every later step is one transaction too, and holds only while its worker still has the job: `claim`
numbers who had it.

    queued -> running -> (staged) -> done        running -> queued (retry) or dead        queued, running -> cancelled

`staged` is the point of no return: all files are complete under temporary names and their hashes are in the rows.
From there a job is only ever finished, by whoever finds it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from engine.saving.job_report import accepted, seconds_per_job
from engine.saving.job_tables import FILES, JOBS, PAYLOADS, TURNS, WAITS
from luna_pictures.filenames import name_key, numbered
from luna_pictures.plan import NewFile
from luna_protocol.errors import Malformed, NotFound, TooLarge, Unavailable
from luna_protocol.save_job import SaveAccepted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much the queue holds and how long it tries.

    Args:
        jobs, bytes: of waiting jobs and of their tensors; more are refused with `Unavailable`. As many dead ones are
            kept beside them, for whoever wants to try them again, and of more the oldest are forgotten.
        job_bytes: of one job.
        attempts: failures of the job's own, or deaths of the worker, after which a job is dead.
        backoff, backoff_cap: seconds before the second try, doubled for each further one up to the cap.
        lease: seconds without a sign of life from its worker after which another one takes a job over.
        keep: seconds for which finished jobs are remembered, so that one sent again is not done again.
    """

    jobs: int = 1000
    bytes: int = 4 << 30
    job_bytes: int = 512 << 20
    attempts: int = 5
    backoff: float = 1.0
    backoff_cap: float = 60.0
    lease: float = 120.0
    keep: float = 7 * 86_400.0


@dataclass(frozen=True)
class NewJob:
    """A job to accept for the workers of `model`: `blob` holds all it needs, `digest` tells it from another of its
    id."""

    job_id: str
    model: str
    client: str
    priority: int
    blob: bytes
    digest: str
    files: Sequence[NewFile]
    warnings: Sequence[str]


@dataclass(frozen=True)
class Claim:
    """The right to work on a job, good until another claim is made."""

    number: int
    job_id: str
    owner: str
    claim: int
    attempts: int
    staged: bool
    submitted: float


@dataclass(frozen=True)
class StagedFile:
    """A complete temporary file `part` (relative to the output root, as `path` is)."""

    position: int
    path: PurePosixPath
    part: PurePosixPath
    sha256: str
    bytes: int
    discarded: bool = False
    quality: float | None = None
    thumbnail: bytes | None = None


# Built once: submitting is what a sampler waits for.
_BEFORE = select(
    select(JOBS.c.digest).where(JOBS.c.job_id == bindparam("id")).scalar_subquery(),
    select(func.count()).where(WAITS).scalar_subquery(),
    select(func.count())
    .where(JOBS.c.state == "queued", JOBS.c.model == bindparam("model"), JOBS.c.priority >= bindparam("priority"))
    .scalar_subquery(),
    select(func.coalesce(func.sum(JOBS.c.bytes), 0)).where(WAITS).scalar_subquery(),
)
_ADD_JOB, _ADD_PAYLOAD, _ADD_FILE = insert(JOBS), insert(PAYLOADS), insert(FILES)
_HIGHEST_SUFFIX = select(func.max(FILES.c.suffix)).where(FILES.c.wanted_key == bindparam("key"))
_RESERVED = select(exists().where(FILES.c.path_key == bindparam("key")))


def _next_job() -> tuple[Select, Select]:
    """Whether a job is ready, and which is next: the best of the clients' own next ones.

    Sorting all that wait would cost each claim as much as the queue is long. The clients are found by leaps through an
    index ("loose index scan", https://wiki.postgresql.org/wiki/Loose_indexscan), and so is each one's next job.
    """
    queued = and_(JOBS.c.state == "queued", JOBS.c.model == bindparam("model"))
    ready = and_(queued, JOBS.c.not_before <= bindparam("now"))
    clients = select(func.min(JOBS.c.client).label("client")).where(queued).cte("clients", recursive=True)
    leap = select(func.min(JOBS.c.client)).where(queued, JOBS.c.client > clients.c.client).scalar_subquery()
    clients = clients.union_all(select(leap).where(clients.c.client.is_not(None)))
    within = (JOBS.c.staged.desc(), JOBS.c.priority.desc())
    own = select(JOBS.c.number).where(ready, JOBS.c.client == clients.c.client).order_by(*within, JOBS.c.number)
    job = (
        select(JOBS)
        .select_from(clients)
        .join(JOBS, JOBS.c.number == own.limit(1).correlate(clients).scalar_subquery())
        .join(TURNS, TURNS.c.client == JOBS.c.client, isouter=True)
        .order_by(*within, func.coalesce(TURNS.c.turn, 0), JOBS.c.number)
        .limit(1)
    )
    return select(exists().where(ready)), job


_ANY_READY, _NEXT = _next_job()


class LostClaim(Exception):
    """The job was cancelled, or another worker has taken it over; what this worker did for it must not be seen."""


class JobStore:
    """The steps of a job; `is_taken(path)` tells whether the output folder has a file of that name already."""

    def __init__(self, engine: Engine, limits: Limits, is_taken: Callable[[PurePosixPath], bool]):
        self.limits = limits
        self._is_taken = is_taken
        self._engine = engine
        self._reading = engine.execution_options(reading=True)

    def submit(self, job: NewJob) -> SaveAccepted:
        """Accepts `job`: when this returns the disk holds it. One that was accepted before gets the same reply again.

        Raises:
            Malformed: another job has the same id.
            TooLarge: it could never be accepted.
            Unavailable: the queue is full.
        """
        if len(job.blob) > min(self.limits.job_bytes, self.limits.bytes):
            raise TooLarge(
                f"the job has {len(job.blob)} bytes", f"send at most {self.limits.job_bytes}: fewer pictures, or uint8"
            )
        for _ in range(10):
            try:
                with self._engine.begin() as db:
                    return self._submit(db, job)
            except IntegrityError as error:
                # Another worker took the id or a name in the same instant (PostgreSQL; SQLite lets one in at a time).
                collision = error
        raise Unavailable(f"no name could be reserved: {collision.orig}", "send the job again", retry_after=1)

    def _submit(self, db: Connection, job: NewJob) -> SaveAccepted:
        digest, waiting, ahead, held = db.execute(
            _BEFORE, {"id": job.job_id, "model": job.model, "priority": job.priority}
        ).one()
        if digest is not None:
            if digest != job.digest:
                raise Malformed(f"the id {job.job_id} is another job's", "make a new id for every job")
            return accepted(db, job.job_id)
        if waiting >= self.limits.jobs or held + len(job.blob) > self.limits.bytes:
            raise Unavailable(
                f"the queue is full: {waiting} of {self.limits.jobs} jobs, {held} of {self.limits.bytes} bytes",
                "wait, or cancel some: scripts/jobs.py lists them",
                retry_after=max(1.0, min(60.0, seconds_per_job(db) or 5.0)),
            )
        row = {name: getattr(job, name) for name in ("job_id", "model", "client", "priority", "digest", "warnings")}
        row |= {"bytes": len(job.blob), "submitted": time.time()}
        number = db.execute(_ADD_JOB, row).inserted_primary_key[0]
        db.execute(_ADD_PAYLOAD, {"number": number, "blob": job.blob})
        paths = []
        for position, file in enumerate(job.files):
            name = self._free_name(db, file.path)
            db.execute(_ADD_FILE, {"number": number, "position": position, **asdict(file), **name})
            paths.append(name["path"])
        return SaveAccepted(job_id=job.job_id, state="queued", position=ahead, files=paths, warnings=job.warnings)

    def _free_name(self, db: Connection, wanted: PurePosixPath) -> dict:
        """`wanted`, or the first numbered form of it that neither a job nor a file has."""
        key = name_key(wanted)
        highest = db.scalar(_HIGHEST_SUFFIX, {"key": key})
        suffix = 0 if highest is None else highest + 1
        while True:
            path = numbered(wanted, suffix)
            if not db.scalar(_RESERVED, {"key": name_key(path)}) and not self._is_taken(path):
                return {"path": str(path), "path_key": name_key(path), "wanted_key": key, "suffix": suffix}
            suffix += 1

    def claim(self, owner: str, model: str) -> Claim | None:
        """The next job of `model`: begun ones first, then by priority, then the client whose turn it is, then the
        oldest."""
        now = {"model": model, "now": time.time()}
        with self._reading.connect() as db:
            if not db.scalar(_ANY_READY, now):
                return None
        while True:
            # Another worker may write the same new client's first turn.
            with suppress(IntegrityError), self._engine.begin() as db:
                row = db.execute(_NEXT, now).first()
                if row is None:
                    return None
                if claim := self._take(db, row, owner):
                    return claim

    def _take(self, db: Connection, row: Row, owner: str) -> Claim | None:
        """The claim on a job that was ready a moment ago; None when another worker took it (PostgreSQL)."""
        numbers = {"claim": row.claim + 1, "attempts": row.attempts + 1}
        taken = db.execute(
            update(JOBS)
            .where(JOBS.c.number == row.number, JOBS.c.state == "queued", JOBS.c.claim == row.claim)
            .values(state="running", owner=owner, lease_until=time.time() + self.limits.lease, **numbers)
        )
        if not taken.rowcount:
            return None
        self._take_turn(db, row.client)
        told = {name: getattr(row, name) for name in ("number", "job_id", "staged", "submitted")}
        return Claim(owner=owner, **told, **numbers)

    def _take_turn(self, db: Connection, client: str) -> None:
        turn = (db.scalar(select(func.max(TURNS.c.turn))) or 0) + 1
        if not db.execute(update(TURNS).where(TURNS.c.client == client).values(turn=turn)).rowcount:
            db.execute(insert(TURNS).values(client=client, turn=turn))

    def payload(self, claim: Claim) -> bytes:
        with self._reading.connect() as db:
            blob = db.scalar(select(PAYLOADS.c.blob).where(PAYLOADS.c.number == claim.number))
        if blob is None:
            raise LostClaim(claim.job_id)
        return blob

    def files(self, number: int) -> list[Row]:
        with self._reading.connect() as db:
            return db.execute(select(FILES).where(FILES.c.number == number).order_by(FILES.c.position)).all()

    def stage(self, claim: Claim, files: Iterable[StagedFile]) -> None:
        """The point of no return: every file of the job is complete under its temporary name.

        Raises:
            LostClaim: and then these files must go.
        """
        with self._held(claim) as db:
            self._set(db, claim, staged=True)
            for file in files:
                row = _is(claim, file.position)
                values = {
                    "part": str(file.part),
                    "sha256": file.sha256,
                    "bytes": file.bytes,
                    "discarded": file.discarded,
                    "quality": file.quality,
                    "thumbnail": file.thumbnail,
                }
                if db.scalar(select(FILES.c.path).where(row)) != str(file.path):
                    values |= self._free_name(db, file.path)
                db.execute(update(FILES).where(row).values(**values))

    def unstage(self, claim: Claim) -> None:
        """Back to before `stage`: a file vanished, so the job has to be done again."""
        with self._held(claim) as db:
            self._set(db, claim, staged=False)
            db.execute(update(FILES).where(FILES.c.number == claim.number).values(part=None, sha256=None, bytes=None))

    def rename(self, claim: Claim, position: int) -> PurePosixPath:
        """A new name for a file whose promised one another program has taken since."""
        with self._held(claim) as db:
            path = PurePosixPath(db.scalar(select(FILES.c.path).where(_is(claim, position))))
            name = self._free_name(db, path)
            db.execute(update(FILES).where(_is(claim, position)).values(**name))
        return PurePosixPath(name["path"])

    def finish(self, claim: Claim, seconds: float | None, reason: str = "") -> None:
        """Done: all files have their names. `seconds` is what it took of the pipeline, None if unknown; `reason` why
        some are no pictures."""
        with self._held(claim) as db:
            self._set(db, claim, state="done", owner=None, finished=time.time(), seconds=seconds, reason=reason)
            db.execute(delete(PAYLOADS).where(PAYLOADS.c.number == claim.number))

    def fail(self, claim: Claim, reason: str, *, forever: bool = False, counts: bool = True) -> None:
        """Puts the job back for a later try, or among the dead when it fails `forever` or was tried often enough; a
        staged job never dies. A failure that does not count (disk full) leaves the number of attempts as it was."""
        with self._held(claim) as db:
            staged = db.scalar(select(JOBS.c.staged).where(JOBS.c.number == claim.number))
            dead = not staged and (forever or (counts and claim.attempts >= self.limits.attempts))
            attempts = claim.attempts if counts else claim.attempts - 1
            # Claims that did not count are failures in a row of the machine.
            in_a_row = attempts if counts else claim.claim - attempts
            self._set(
                db,
                claim,
                state="dead" if dead else "queued",
                owner=None,
                reason=reason,
                attempts=attempts,
                not_before=time.time() + self._backoff(in_a_row),
                finished=time.time() if dead else None,
            )
            if dead:
                self._bound_dead(db)

    def renew(self, claims: Iterable[Claim]) -> None:
        """Signs of life for jobs that their worker still works on."""
        with self._engine.begin() as db:
            for claim in claims:
                db.execute(update(JOBS).where(_still(claim)).values(lease_until=time.time() + self.limits.lease))

    def held(self) -> list[Row]:
        """Jobs that some worker has, or had when they were cancelled."""
        with self._reading.connect() as db:
            return db.execute(select(JOBS).where(JOBS.c.owner.is_not(None))).all()

    def take_from_dead(self, row: Row) -> bool:
        """Frees a job of `held` whose worker is gone; False when that has been done meanwhile."""
        spent = not row.staged and row.attempts >= self.limits.attempts
        reason = f"its worker died, {row.attempts} times in all"
        values: dict = {"owner": None}
        if row.state == "running":
            values |= {"state": "dead" if spent else "queued", "reason": reason}
            values |= {"not_before": time.time() + (0 if row.attempts <= 1 else self._backoff(row.attempts - 1))}
            values |= {"finished": time.time() if spent else None}
        with self._engine.begin() as db:
            mine = and_(JOBS.c.number == row.number, JOBS.c.claim == row.claim, JOBS.c.owner == row.owner)
            freed = bool(db.execute(update(JOBS).where(mine).values(**values)).rowcount)
            if spent:
                self._bound_dead(db)
            return freed

    def cancel(self, job_id: str) -> None:
        """Cancels a job that is not staged. Its owner, or who takes over from that, removes what it has on disk.

        Raises:
            NotFound: no such job.
            Malformed: it is finished, or its files are already being put in place.
        """
        with self._engine.begin() as db:
            row = self._find(db, job_id)
            may = and_(JOBS.c.state.in_(("queued", "running", "dead")), JOBS.c.staged.is_(False))
            cancelled = update(JOBS).where(JOBS.c.number == row.number, may)
            if not db.execute(cancelled.values(state="cancelled", finished=time.time(), reason="cancelled")).rowcount:
                raise Malformed(
                    f"the job is {'being put in place' if row.staged and row.state != 'done' else row.state}",
                    "only jobs that wait, run or are dead can be cancelled",
                )
            db.execute(delete(PAYLOADS).where(PAYLOADS.c.number == row.number))

    def dead(self) -> list[str]:
        """The ids of the dead jobs, the first first."""
        with self._reading.connect() as db:
            return list(db.scalars(select(JOBS.c.job_id).where(JOBS.c.state == "dead").order_by(JOBS.c.number)))

    def retry(self, job_id: str) -> None:
        """Puts a dead job back with a fresh count of attempts.

        Raises:
            NotFound: no such job.
            Malformed: it is not dead.
        """
        with self._engine.begin() as db:
            row = self._find(db, job_id)
            if row.state != "dead":
                raise Malformed(f"the job is {row.state}", "only dead jobs can be tried again")
            db.execute(
                update(JOBS)
                .where(JOBS.c.number == row.number, JOBS.c.state == "dead")
                .values(state="queued", attempts=0, not_before=0.0, finished=None)
            )

    def purge(self, states: Sequence[str], older_than: float, job_ids: Sequence[str] = ()) -> list[str]:
        """Forgets finished jobs that no worker holds: those named, or all of `states` that ended more than `older_than`
        seconds ago. Their ids."""
        gone = JOBS.c.job_id.in_(job_ids) if job_ids else JOBS.c.finished <= time.time() - older_than
        finished = and_(JOBS.c.state.in_(states), JOBS.c.owner.is_(None), gone)
        with self._engine.begin() as db:
            rows = db.execute(select(JOBS).where(finished)).all()
            for row in rows:
                db.execute(delete(JOBS).where(JOBS.c.number == row.number))
            db.execute(delete(TURNS).where(TURNS.c.client.not_in(select(JOBS.c.client))))
        return [row.job_id for row in rows]

    def _bound_dead(self, db: Connection) -> None:
        dead = select(JOBS).where(JOBS.c.state == "dead").order_by(JOBS.c.finished.desc(), JOBS.c.number.desc())
        size = 0
        for count, row in enumerate(db.execute(dead).all(), start=1):
            size += row.bytes
            if count > self.limits.jobs or size > self.limits.bytes:
                log.warning("forgetting job %s, as too many later ones are dead too: %s", row.job_id, row.reason)
                db.execute(delete(JOBS).where(JOBS.c.number == row.number))

    def _backoff(self, attempts: int) -> float:
        return min(self.limits.backoff_cap, self.limits.backoff * 2 ** min(attempts - 1, 20))

    def _find(self, db: Connection, job_id: str) -> Row:
        row = db.execute(select(JOBS).where(JOBS.c.job_id == job_id)).one_or_none()
        if row is None:
            raise NotFound(f"there is no job {job_id}", "it was never accepted, or has been purged")
        return row

    @contextmanager
    def _held(self, claim: Claim) -> Iterator[Connection]:
        """A transaction during which nobody else can take the job."""
        with self._engine.begin() as db:
            lease = time.time() + self.limits.lease
            if not db.execute(update(JOBS).where(_still(claim)).values(lease_until=lease)).rowcount:
                raise LostClaim(claim.job_id)
            yield db

    @staticmethod
    def _set(db: Connection, claim: Claim, **values: object) -> None:
        db.execute(update(JOBS).where(JOBS.c.number == claim.number).values(**values))


def _still(claim: Claim) -> ColumnElement[bool]:
    """Whether the job is the claim's: neither cancelled nor taken over."""
    mine = and_(JOBS.c.number == claim.number, JOBS.c.owner == claim.owner, JOBS.c.claim == claim.claim)
    return and_(mine, JOBS.c.state == "running")


def _is(claim: Claim, position: int) -> ColumnElement[bool]:
    return and_(FILES.c.number == claim.number, FILES.c.position == position)
