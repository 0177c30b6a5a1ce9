"""What a server holds and does, put together for people from its index and its metrics."""

import re
import threading
import time
from collections import deque
from typing import Any

import urllib3

from luna_client.server import Server
from luna_protocol.errors import LunaError
from luna_protocol.messages import Index
from luna_protocol.save_job import QueueStatus

_SERIES = re.compile(r"^(\w+)(?:\{[^}]*\})?\s+(\S+)$")
# TorchServe's own, of which the index tells better.
_NOT_OURS = ("ts_", "Requests", "QueueTime", "Worker", "HandlerTime", "PredictionTime")

_JOBS_SHOWN = 12
_RATE_SECONDS = 10.0  # a step may take seconds, and workers write their counts once a second
_BUSY_SECONDS = 2.5  # a quick step is over whenever one looks


class Activity:
    """How many requests each worker answers, from several looks at their counts."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, dict[tuple[str, int], int]]] = deque()

    def look(self, index: Index, now: float) -> list[dict[str, Any]]:
        """The index's models as JSON; each worker has also requests_per_second, of the last ten seconds, and is busy
        too when it has answered a request within the last two. The repository is idle: it answers our own asking.

        Args:
            now: in seconds, of a clock that does not go back.
        """
        counts = {(model.name, worker.pid): worker.requests for model in index.models for worker in model.workers}
        self._looks.append((now, counts))
        while now - self._looks[0][0] > _RATE_SECONDS:
            self._looks.popleft()
        models = [model.model_dump() for model in index.models]
        for model in models:
            for worker in model["workers"]:
                key, ours = (model["name"], worker["pid"]), model["role"] == "repository"
                grown, seconds = self._grown(key, now - _RATE_SECONDS)
                worker["requests_per_second"] = grown / seconds if seconds and not ours else 0.0
                just_now, _ = self._grown(key, now - _BUSY_SECONDS)
                worker["busy"] = not ours and (worker["busy"] or just_now > 0)
        return models

    def _grown(self, worker: tuple[str, int], since: float) -> tuple[int, float]:
        """By how much a worker's count grew, and in how many seconds."""
        counts = [(at, look[worker]) for at, look in self._looks if at >= since and worker in look]
        (first, before), (last, after) = counts[0], counts[-1]
        return after - before, last - first


class Accountant:
    """Remembers the last looks at a server, which requests per second are counted from."""

    def __init__(self) -> None:
        self._of: Server | None = None
        self._activity = Activity()
        self._lock = threading.Lock()

    def account(self, server: Server, metrics: str) -> dict[str, Any]:
        """One look at a server whose metrics are at the address `metrics`.

        address; protocol_version; models, see `Activity.look`; loras as in the index; requests_per_second and
        busy_workers, over all models; counters, the sums of the metrics that LunaServe's handlers declare (LoRA
        overlays, step cache, decode queue), none where the address does not answer; queue, its `QueueReport` with the
        newest jobs and their thumbnails, None where its database cannot be read.

        Raises:
            LunaError: the server cannot be reached, or refuses us.
        """
        index = server.index()
        with self._lock:
            if self._of is not server:
                self._of, self._activity = server, Activity()
            models = self._activity.look(index, time.monotonic())
        workers = [worker for model in models for worker in model["workers"]]
        return {
            "address": server.inference,
            "protocol_version": index.protocol_version,
            "models": models,
            "loras": index.loras,
            "requests_per_second": sum(worker["requests_per_second"] for worker in workers),
            "busy_workers": sum(worker["busy"] for worker in workers),
            "counters": _counters(metrics),
            "queue": _queue(server),
        }


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
