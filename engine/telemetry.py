"""What a model has to report to Prometheus, collected until a relay fetches it: TorchServe's workers write it down."""

import os
import threading
import time
from typing import Any

import psutil
import torch

_MEMORY_EVERY = 10.0  # seconds


class Telemetry:
    """Metrics of one model; metrics.yaml declares the names. Safe to share among threads."""

    def __init__(self, device: torch.device):
        self._device = device
        self._process = psutil.Process()
        self._memory_told = -_MEMORY_EVERY
        self._lock = threading.Lock()
        self._collected: list[dict[str, Any]] = []

    def observe(self, name: str, value: float, unit: str, kind: str, **labels: str) -> None:
        """One value. Those of a counter are added up, a histogram's are kept one by one, of a gauge's the last."""
        with self._lock:
            self._collected.append({"name": name, "value": value, "unit": unit, "kind": kind, "labels": labels})

    def answered(self, outcome: str) -> None:
        """One request, and what it came to: "ok", or an error's code."""
        self.observe("LunaRequests", 1, "count", "counter", Outcome=outcome)

    def ran(self, requests: int, seconds: float) -> None:
        """One run of the model for requests that were joined."""
        self.observe("LunaRunSeconds", seconds, "Seconds", "histogram")
        self.observe("LunaBatchSize", requests, "count", "histogram")

    def memory(self, weights_bytes: int) -> None:
        """The weights, and all that this process holds of its device; at most every ten seconds."""
        now = time.monotonic()
        if now - self._memory_told < _MEMORY_EVERY:
            return
        self._memory_told = now
        cuda = self._device.type == "cuda"
        held = torch.cuda.memory_reserved(self._device) if cuda else self._process.memory_info().rss
        worker = str(os.getpid())
        self.observe("LunaWeightsBytes", weights_bytes, "B", "gauge", WorkerName=worker)
        self.observe("LunaMemoryBytes", held, "B", "gauge", WorkerName=worker)

    def collect(self) -> list[dict[str, Any]]:
        """What came since the last time, counters of one kind as one."""
        with self._lock:
            collected, self._collected = self._collected, []
        sums: dict[tuple, dict[str, Any]] = {}
        rest = []
        for each in collected:
            if each["kind"] != "counter":
                rest.append(each)
                continue
            key = each["name"], *sorted(each["labels"].items())
            if key in sums:
                sums[key]["value"] += each["value"]
            else:
                sums[key] = each
        return [*sums.values(), *rest]
