"""What the queue tells about itself and its jobs; reads only."""

import base64
import time
from collections import Counter
from collections.abc import Sequence

from sqlalchemy import Connection, Engine, Row, and_, func, or_, select

from engine.saving.job_owner import model_key
from engine.saving.job_tables import FILES, JOBS, WAITS
from luna_protocol.save_job import JobStatus, QueueReport, QueueStatus, SaveAccepted, SavedFile

_WINDOW = 600.0


def accepted(db: Connection, job_id: str) -> SaveAccepted:
    """The reply to a job that was accepted before."""
    row = db.execute(select(JOBS).where(JOBS.c.job_id == job_id)).one()
    paths = db.scalars(select(FILES.c.path).where(FILES.c.number == row.number).order_by(FILES.c.position)).all()
    return SaveAccepted(
        job_id=job_id, state=row.state, position=_position(db, row) or 0, files=paths, warnings=row.warnings
    )


def report(engine: Engine, asked: QueueStatus, workers: Counter[str]) -> QueueReport:
    """The queue's figures, and the jobs that were asked for; `workers` are at work, counted by `model_key`."""
    query = select(JOBS).order_by(JOBS.c.number.desc())
    if asked.job_ids:
        query = query.where(JOBS.c.job_id.in_(asked.job_ids))
    else:
        query = query.limit(asked.limit)
        if asked.client is not None:
            query = query.where(JOBS.c.client == asked.client)
        if asked.states:
            query = query.where(JOBS.c.state.in_(asked.states))
    with engine.execution_options(reading=True).connect() as db:
        counts = dict.fromkeys(("queued", "running", "done", "dead", "cancelled"), 0)
        counts |= {
            row.state: row.n for row in db.execute(select(JOBS.c.state, func.count().label("n")).group_by("state"))
        }
        recent = and_(JOBS.c.state == "done", JOBS.c.finished > time.time() - _WINDOW)
        done = db.scalar(select(func.count()).where(recent))
        each = seconds_per_job(db)
        waiting = counts["queued"] + counts["running"]
        return QueueReport(
            counts=counts,
            bytes=db.scalar(select(func.coalesce(func.sum(JOBS.c.bytes), 0)).where(WAITS)),
            throughput=done * 60 / _WINDOW,
            estimated_wait=None if each is None else waiting * each / max(1, workers.total()),
            jobs=_statuses(db, db.execute(query).all(), asked.thumbnails, workers),
        )


def seconds_per_job(db: Connection) -> float | None:
    """Seconds one job took of the pipeline, the mean of the last twenty; None when none was finished."""
    last = select(JOBS.c.seconds).where(JOBS.c.state == "done").order_by(JOBS.c.finished.desc()).limit(20).subquery()
    return db.scalar(select(func.avg(last.c.seconds)))


def _position(db: Connection, row: Row) -> int | None:
    if row.state != "queued":
        return None
    ahead = or_(JOBS.c.priority > row.priority, and_(JOBS.c.priority == row.priority, JOBS.c.number < row.number))
    return db.scalar(select(func.count()).where(JOBS.c.state == "queued", JOBS.c.model == row.model, ahead))


def _statuses(db: Connection, rows: Sequence[Row], thumbnails: bool, workers: Counter[str]) -> list[JobStatus]:
    files: dict[int, list[SavedFile]] = {row.number: [] for row in rows}
    for file in db.execute(select(FILES).where(FILES.c.number.in_(files)).order_by(FILES.c.position)):
        files[file.number].append(_file(file, thumbnails))
    return [_status(db, row, files[row.number], workers) for row in rows]


def _status(db: Connection, row: Row, files: list[SavedFile], workers: Counter[str]) -> JobStatus:
    waits = row.state == "queued" and row.not_before > time.time()
    not_loaded = row.state == "queued" and not workers[model_key(row.model)]
    reasons = [f"no VAE of {row.model} is loaded here"] if not_loaded else []
    return JobStatus(
        job_id=row.job_id,
        client=row.client,
        priority=row.priority,
        state=row.state,
        position=_position(db, row),
        attempts=row.attempts,
        reason="; ".join([*reasons, *filter(None, [row.reason])]),
        retry_in=row.not_before - time.time() if waits else None,
        submitted=row.submitted,
        finished=row.finished,
        files=files,
    )


def _file(row: Row, with_thumbnail: bool) -> SavedFile:
    return SavedFile(
        path=row.path,
        kind=row.kind,
        width=row.width,
        height=row.height,
        sha256=row.sha256,
        bytes=row.bytes,
        discarded=row.discarded,
        quality=row.quality,
        thumbnail=base64.b64encode(row.thumbnail).decode() if with_thumbnail and row.thumbnail else None,
    )
