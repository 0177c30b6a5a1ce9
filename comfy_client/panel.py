"""Routes on ComfyUI's own server for the sidebar panel: the browser talks to ComfyUI, only ComfyUI talks to the server.

So the server's tokens stay here, and the server may listen on this machine's loopback alone.
"""

import asyncio
import re
import time
from typing import Any

import urllib3
from aiohttp import web
from server import PromptServer

from comfy_client import settings
from comfy_client.server import Server
from protocol.errors import LunaError, Malformed

_SERIES = re.compile(r"^(\w+)(?:\{[^}]*\})?\s+(\S+)$")
# TorchServe's own, of which the panel shows what the index tells better.
_NOT_OURS = ("ts_", "Requests", "QueueTime", "Worker", "HandlerTime", "PredictionTime")


class _Rate:
    """Requests a second since the last look, from the workers' own counts."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def since_last(self, requests: int) -> float:
        now = time.monotonic()
        before, self._last = self._last, (now, requests)
        if before is None or requests < before[1]:
            return 0.0
        return (requests - before[1]) / max(now - before[0], 1e-3)


_rate = _Rate()


def account(server: Server) -> dict[str, Any]:
    """What the panel and Luna Server Status show.

    address; models as in the index; requests_per_second since the last call; counters, the sums of the metrics that
    LunaServe's handlers declare (LoRA overlays, step cache, decode queue).

    Raises:
        LunaError: the server cannot be reached, or refuses us.
    """
    index = server.index()
    models = [model.model_dump() for model in index.models]
    # The repository's own count grows by our asking.
    requests = sum(w.requests for model in index.models if model.role != "repository" for w in model.workers)
    return {
        "address": server.inference,
        "protocol_version": index.protocol_version,
        "models": models,
        "loras": index.loras,
        "requests_per_second": _rate.since_last(requests),
        "counters": _counters(),
    }


def sums(metrics: str) -> dict[str, float]:
    """{metric: sum over its label sets} of LunaServe's own metrics in a Prometheus text."""
    found: dict[str, float] = {}
    for line in metrics.splitlines():
        series = _SERIES.match(line)
        if series and not series[1].startswith(_NOT_OURS) and not series[1].endswith(("_bucket", "_created")):
            found[series[1]] = found.get(series[1], 0.0) + float(series[2])
    return found


def register_routes() -> None:
    """Add the panel's routes to ComfyUI's server."""
    routes = PromptServer.instance.routes

    @routes.get("/luna/status")
    async def status(_request: web.Request) -> web.Response:
        return await _answer(lambda: account(settings.server()))

    @routes.post("/luna/models/{model}/{action}")
    async def change(request: web.Request) -> web.Response:
        fields = await request.json() if request.can_read_body else {}
        return await _answer(lambda: _change(request.match_info["model"], request.match_info["action"], fields))


def _change(model: str, action: str, fields: dict[str, Any]) -> dict[str, Any]:
    server = settings.server()
    if action == "load":
        server.register(f"{model}.mar")
        server.wait_ready([model])
    elif action == "unload":
        server.unregister(model)
    elif action == "scale":
        workers = fields.get("workers")
        if not isinstance(workers, int) or not 1 <= workers <= 64:
            raise Malformed(f"workers is {workers!r}", "send a number from 1 to 64")
        server.scale(model, workers)
        server.wait_ready([model])
    else:
        raise Malformed(f"there is no action {action!r}", "load, unload and scale are")
    return {"model": model, "done": action}


async def _answer(work) -> web.Response:
    """The work's outcome as JSON, with the server's own status for what went wrong."""
    try:
        return web.json_response(await asyncio.to_thread(work))
    except LunaError as error:
        return web.Response(body=error.to_json(), status=error.status, content_type="application/json")


def _counters() -> dict[str, float]:
    try:
        answer = urllib3.request("GET", f"{settings.current().metrics}/metrics", timeout=2.0, retries=False)
    except urllib3.exceptions.HTTPError:
        return {}
    return sums(answer.data.decode()) if answer.status == 200 else {}
