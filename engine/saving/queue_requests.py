"""What may be asked of the decode queue: of a VAE's workers, and of the repository."""

from engine.saving.decode_queue import DecodeQueue
from engine.saving.job_store import Limits
from engine.settings import QueueSettings
from luna_protocol.messages import Message, Request
from luna_protocol.save_job import CancelJobs, PurgeJobs, QueueStatus, RetryJobs

QUEUE_REQUESTS = (QueueStatus, CancelJobs, RetryJobs, PurgeJobs)


def open_queue(settings: QueueSettings) -> DecodeQueue:
    """The queue of the spool folder, as the settings bound it."""
    roots = settings.roots
    limits = Limits(jobs=settings.queue_jobs, bytes=settings.queue_mb << 20, attempts=settings.queue_attempts)
    return DecodeQueue(roots.spool, roots.output, limits, settings.queue_database)


def answer(queue: DecodeQueue, request: Request) -> Message:
    """The reply to one of `QUEUE_REQUESTS`."""
    match request:
        case QueueStatus():
            return queue.report(request)
        case CancelJobs():
            return queue.cancel(request)
        case RetryJobs():
            return queue.retry(request)
        case PurgeJobs():
            return queue.purge(request)
    raise TypeError(f"{type(request).__name__} is not of the queue")
