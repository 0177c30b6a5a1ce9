"""Luna Server Status and Luna Queue Status: what the server holds, does and has to do, as text."""

from collections.abc import Callable
from typing import Any

from comfy_client import settings
from comfy_client.panel import account
from luna_client.server import Server
from luna_protocol.errors import LunaError
from luna_protocol.messages import validate
from luna_protocol.save_job import QueueReport, QueueStatus


class _Report:
    CATEGORY = "Luna"
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")

    @staticmethod
    def _shown(look: Callable[[Server], tuple[str, Any]], away: Any) -> dict[str, Any]:
        """A node's outcome: the text and figure that `look` gives, or why it cannot and `away`."""
        server = settings.server()
        try:
            told, figure = look(server)
        except LunaError as error:
            told, figure = f"{server.inference}: {error}", away
        return {"ui": {"text": [told]}, "result": (told, figure)}


class LunaServerStatus(_Report):
    TITLE = "Luna Server Status"
    DESCRIPTION = "Devices, memory, models, workers, requests, cache hits and queue of the server."
    RETURN_TYPES = ("STRING", "BOOLEAN")
    RETURN_NAMES = ("status", "running")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def report(self):
        return self._shown(lambda _server: (_text(account()), True), away=False)


class LunaQueueStatus(_Report):
    TITLE = "Luna Queue Status"
    DESCRIPTION = "The decode queue's figures and its newest jobs, as text."
    RETURN_TYPES = ("STRING", "INT")
    RETURN_NAMES = ("status", "waiting")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        limit = {"default": 10, "min": 0, "max": 1000, "tooltip": "How many jobs to tell of, the newest first."}
        return {"required": {"limit": ("INT", limit)}}

    def report(self, limit: int):
        def look(server: Server) -> tuple[str, int]:
            report = validate(QueueReport, server.ask(QueueStatus(limit=limit)))
            return _queue_text(report), report.counts.get("queued", 0) + report.counts.get("running", 0)

        return self._shown(look, away=-1)


def _text(status: dict[str, Any]) -> str:
    load = f"{status['busy_workers']} busy, {status['requests_per_second']:.1f} requests a second"
    lines = [f"{status['address']}: {load}"]
    for model in status["models"]:
        workers = "; ".join(_worker(worker) for worker in model["workers"])
        lines.append(f"{model['name']}: {workers or 'not loaded'}")
    lines += [f"{name}: {value:,g}" for name, value in status["counters"].items()]
    return "\n".join(lines)


def _worker(worker: dict[str, Any]) -> str:
    if worker["state"] != "ready":
        return f"{worker['state']}: {worker['reason']}"
    megabytes = worker["weights_bytes"] / 1e6
    load = "busy" if worker["busy"] else "idle"
    return f"{worker['device']} {worker['dtype']}, {megabytes:,.0f} MB, {worker['requests']} requests, {load}"


def _queue_text(report: QueueReport) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in report.counts.items()) or "empty"
    wait = "unknown" if report.estimated_wait is None else f"{report.estimated_wait:.0f} s"
    lines = [f"{counts}; {report.throughput:.1f} jobs a minute; a new job would wait {wait}"]
    for job in report.jobs:
        reason = f" ({job.reason})" if job.reason else ""
        lines.append(f"{job.job_id[:8]} {job.state}{reason}: {', '.join(file.path for file in job.files)}")
    return "\n".join(lines)


NODES = {"LunaServerStatus": LunaServerStatus, "LunaQueueStatus": LunaQueueStatus}
