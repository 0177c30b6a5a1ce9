"""The decode queue's figures as metrics; metrics.yaml declares them."""

import time
from collections.abc import Callable

from engine.saving.decode_queue import DecodeQueue
from luna_protocol.save_job import QueueStatus

_HISTOGRAMS = {
    "queue_wait": "DecodeQueueWait",
    "decode": "DecodeQueueDecode",
    "write": "DecodeQueueWrite",
    "total": "DecodeQueueTotal",
}
_GAUGES_EVERY = 1.0  # seconds: a gauge costs a look into the queue's database


class QueueMetrics:
    """Passes on what a `DecodeWorker` observes of `queue`.

    Args:
        observe: as in `Surroundings`.
    """

    def __init__(self, observe: Callable[[str, float, str, str], None], queue: DecodeQueue):
        self._observe, self._queue = observe, queue
        self._gauged = 0.0

    def observe(self, name: str, seconds: float) -> None:
        self._observe(_HISTOGRAMS[name], seconds, "Seconds", "histogram")
        now = time.monotonic()
        if now > self._gauged + _GAUGES_EVERY:
            self._gauged = now
            report = self._queue.report(QueueStatus(limit=0))
            for state, count in report.counts.items():
                self._observe(f"DecodeQueue{state.title()}Jobs", count, "Count", "gauge")
            self._observe("DecodeQueueBytes", report.bytes, "Bytes", "gauge")
