"""What every role tells Prometheus, through TorchServe; metrics.yaml declares the names."""

import os
import threading
import time
from typing import Any

import psutil
import torch
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

_MEMORY_EVERY = 10.0  # seconds
_TOLD_AFTER = 1.0  # seconds


class HandlerMetrics:
    """Metrics of one worker. TorchServe reads them from the worker's output, a line each. Writing three for every
    request took a third of a worker's own time, so they are told together, a second later, while others may run; a
    worker that is killed takes its last second's along."""

    def __init__(self, metrics: Any, model: str, device: torch.device):
        self._metrics, self._model, self._device = metrics, model, device
        self._process = psutil.Process()
        self._memory_told = -_MEMORY_EVERY
        self._lock = threading.Lock()
        self._untold: list[tuple[str, float, str, MetricTypes, dict[str, str]]] = []

    def answered(self, outcome: str) -> None:
        """One request, and what it came to: "ok", or an error's code."""
        self._add("LunaRequests", 1, "count", MetricTypes.COUNTER, Outcome=outcome)

    def ran(self, requests: int, seconds: float) -> None:
        """One run of the model for requests that were joined."""
        self._add("LunaRunSeconds", seconds, "Seconds", MetricTypes.HISTOGRAM)
        self._add("LunaBatchSize", requests, "count", MetricTypes.HISTOGRAM)

    def memory(self, weights_bytes: int) -> None:
        """The weights, and all that this process holds of its device; at most every ten seconds."""
        now = time.monotonic()
        if now - self._memory_told < _MEMORY_EVERY:
            return
        self._memory_told = now
        if self._device.type == "cuda":
            held = torch.cuda.memory_reserved(self._device)
        else:
            held = self._process.memory_info().rss
        worker = str(os.getpid())
        self._add("LunaWeightsBytes", weights_bytes, "B", MetricTypes.GAUGE, WorkerName=worker)
        self._add("LunaMemoryBytes", held, "B", MetricTypes.GAUGE, WorkerName=worker)

    def _add(self, name: str, value: float, unit: str, kind: MetricTypes, **labels: str) -> None:
        with self._lock:
            self._untold.append((name, value, unit, kind, labels))
            if len(self._untold) > 1:
                return
        timer = threading.Timer(_TOLD_AFTER, self._tell)
        timer.daemon = True
        timer.start()

    def _tell(self) -> None:
        with self._lock:
            untold, self._untold = self._untold, []
        for name, value, unit, kind, labels in untold:
            pairs = {"ModelName": self._model, "Level": "Model"} | labels
            dimensions = [Dimension(label, text) for label, text in pairs.items()]
            self._metrics.add_metric(name, value, unit, dimensions=dimensions, metric_type=kind)
