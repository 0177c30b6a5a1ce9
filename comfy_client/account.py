"""What a server holds and does, put together for people from its index and its metrics."""

import re
import time
from typing import Any

import urllib3

from comfy_client.server import Server
from luna_protocol.errors import LunaError
from luna_protocol.save_job import QueueStatus

_SERIES = re.compile(r"^(\w+)(?:\{[^}]*\})?\s+(\S+)$")
# TorchServe's own, of which the index tells better.
_NOT_OURS = ("ts_", "Requests", "QueueTime", "Worker", "HandlerTime", "PredictionTime")

_JOBS_SHOWN = 12


class Accountant:
    """Remembers the last look, which requests per second are counted from."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def account(self, server: Server, metrics: str) -> dict[str, Any]:
        """One look at a server whose metrics are at the address `metrics`.

        address; protocol_version; models and loras as in the index; requests_per_second since the last look; counters,
        the sums of the metrics that LunaServe's handlers declare (LoRA overlays, step cache, decode queue), none where
        the address does not answer; queue, its `QueueReport` with the newest jobs and their thumbnails, None where its
        database cannot be read.

        Raises:
            LunaError: the server cannot be reached, or refuses us.
        """
        index = server.index()
        # The repository's own count grows by our asking.
        requests = sum(w.requests for model in index.models if model.role != "repository" for w in model.workers)
        return {
            "address": server.inference,
            "protocol_version": index.protocol_version,
            "models": [model.model_dump() for model in index.models],
            "loras": index.loras,
            "requests_per_second": self._rate(requests),
            "counters": _counters(metrics),
            "queue": _queue(server),
        }

    def _rate(self, requests: int) -> float:
        now = time.monotonic()
        before, self._last = self._last, (now, requests)
        if before is None or requests < before[1]:
            return 0.0
        return (requests - before[1]) / max(now - before[0], 1e-3)


def sums(metrics: str) -> dict[str, float]:
    """{metric: sum over its label sets} of LunaServe's own metrics in a Prometheus text."""
    found: dict[str, float] = {}
    for line in metrics.splitlines():
        series = _SERIES.match(line)
        if series and not series[1].startswith(_NOT_OURS) and not series[1].endswith(("_bucket", "_created")):
            found[series[1]] = found.get(series[1], 0.0) + float(series[2])
    return found


def _counters(metrics: str) -> dict[str, float]:
    try:
        answer = urllib3.request("GET", f"{metrics}/metrics", timeout=2.0, retries=False)
    except urllib3.exceptions.HTTPError:
        return {}
    return sums(answer.data.decode()) if answer.status == 200 else {}


def _queue(server: Server) -> dict[str, Any] | None:
    try:
        return server.ask(QueueStatus(limit=_JOBS_SHOWN, thumbnails=True))
    except LunaError:
        return None
