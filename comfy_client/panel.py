"""Routes on ComfyUI's own server for the sidebar panel: the browser talks to ComfyUI, only ComfyUI talks to the server.

So the server's tokens stay here, and the server may listen on this machine's loopback alone.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any

from aiohttp import web
from server import PromptServer

from comfy_client import settings
from comfy_client.account import Accountant
from luna_protocol.errors import LunaError, Malformed
from luna_protocol.messages import Request, validate
from luna_protocol.save_job import CancelJobs, PurgeJobs, RetryJobs

_JOB_ACTIONS: dict[str, tuple[type[Request], dict[str, Any]]] = {
    "cancel": (CancelJobs, {}),
    "retry": (RetryJobs, {}),
    "purge": (PurgeJobs, {"states": ["dead"]}),
}
_accountant = Accountant()


def account() -> dict[str, Any]:
    """What the panel and Luna Server Status show of the server that the settings name."""
    return _accountant.account(settings.server(), settings.current().metrics)


def register_routes(before_lists: Callable[[], None]) -> None:
    """Add the panel's routes to ComfyUI's server, and have it call `before_lists`, which may take its time, before it
    collects what the nodes' lists offer: when a page is opened, and when the user presses R."""
    routes = PromptServer.instance.routes

    @web.middleware
    async def refresh_lists(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]):
        if "object_info" in request.path.split("/")[:3]:
            await _in_thread(before_lists)
        return await handler(request)

    PromptServer.instance.app.middlewares.append(refresh_lists)

    @routes.get("/luna/status")
    async def status(_request: web.Request) -> web.Response:
        return await _answer(account)

    @routes.post("/luna/models/{model}/{action}")
    async def change(request: web.Request) -> web.Response:
        fields = await request.json() if request.can_read_body else {}
        return await _answer(lambda: _change(request.match_info["model"], request.match_info["action"], fields))

    @routes.post("/luna/jobs/{job}/{action}")
    async def change_job(request: web.Request) -> web.Response:
        return await _answer(lambda: _change_job(request.match_info["job"], request.match_info["action"]))


def _change(model: str, action: str, fields: dict[str, Any]) -> dict[str, Any]:
    server = settings.server()
    if action == "load":
        server.load(model)
        server.wait_ready([model])
    elif action == "unload":
        server.unload(model)
    elif action == "scale":
        workers = fields.get("workers")
        if not isinstance(workers, int) or not 1 <= workers <= 64:
            raise Malformed(f"workers is {workers!r}", "send a number from 1 to 64")
        server.scale(model, workers)
        server.wait_ready([model])
    else:
        raise Malformed(f"there is no action {action!r}", "load, unload and scale are")
    return {"model": model, "done": action}


def _change_job(job: str, action: str) -> dict[str, Any]:
    if action not in _JOB_ACTIONS:
        raise Malformed(f"there is no action {action!r}", f"{' and '.join(_JOB_ACTIONS)} are")
    kind, fields = _JOB_ACTIONS[action]
    # Of all dead ones, no job being called so.
    return settings.server().ask(validate(kind, fields | {"job_ids": [] if job == "dead" else [job]}))


async def _answer(work: Callable[[], dict[str, Any]]) -> web.Response:
    """The work's outcome as JSON, with the server's own status for what went wrong."""
    try:
        return web.json_response(await _in_thread(work))
    except LunaError as error:
        return web.Response(body=error.to_json(), status=error.status, content_type="application/json")


async def _in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns. Not by asyncio.to_thread: its few threads serve ComfyUI's own pages too, and ComfyUI would
    wait for them when it ends."""
    outcome: Future[Any] = Future()

    def run() -> None:
        outcome.set_running_or_notify_cancel()  # from here on, a browser that goes away cancels nothing
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, name="luna panel", daemon=True).start()
    return await asyncio.wrap_future(outcome)
