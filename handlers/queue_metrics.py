"""The decode queue's figures as TorchServe's metrics; metrics.yaml declares them."""

import time
from typing import Any

from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

from handlers.engine.saving.decode_queue import DecodeQueue
from luna_protocol.save_job import QueueStatus

_HISTOGRAMS = {
    "queue_wait": "DecodeQueueWait",
    "decode": "DecodeQueueDecode",
    "write": "DecodeQueueWrite",
    "total": "DecodeQueueTotal",
}
_GAUGES_EVERY = 1.0  # seconds: a gauge costs a look into the queue's database


class QueueMetrics:
    """Passes on what a `DecodeWorker` observes of `queue`; `metrics` is TorchServe's, of the model's context."""

    def __init__(self, metrics: Any, model: str, queue: DecodeQueue):
        self._metrics, self._model, self._queue = metrics, model, queue
        self._gauged = 0.0

    def observe(self, name: str, seconds: float) -> None:
        self._set(_HISTOGRAMS[name], seconds, "Seconds", MetricTypes.HISTOGRAM)
        now = time.monotonic()
        if now > self._gauged + _GAUGES_EVERY:
            self._gauged = now
            report = self._queue.report(QueueStatus(limit=0))
            for state, count in report.counts.items():
                self._set(f"DecodeQueue{state.title()}Jobs", count, "Count", MetricTypes.GAUGE)
            self._set("DecodeQueueBytes", report.bytes, "Bytes", MetricTypes.GAUGE)

    def _set(self, name: str, value: float, unit: str, kind: MetricTypes) -> None:
        dimensions = [Dimension("ModelName", self._model), Dimension("Level", "Model")]
        self._metrics.add_metric(name, value, unit, dimensions=dimensions, metric_type=kind)
