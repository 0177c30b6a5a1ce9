"""Luna Server Status: what the server holds and does, as text."""

from typing import Any

from comfy_client import settings
from comfy_client.panel import account
from luna_protocol.errors import LunaError


class LunaServerStatus:
    TITLE = "Luna Server Status"
    CATEGORY = "Luna"
    DESCRIPTION = "Devices, memory, models, workers, requests, cache hits and queue of the server."
    RETURN_TYPES = ("STRING", "BOOLEAN")
    RETURN_NAMES = ("status", "running")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    @classmethod
    def IS_CHANGED(cls) -> float:
        return float("nan")

    def report(self):
        server = settings.server()
        try:
            told, running = _text(account()), True
        except LunaError as error:
            told, running = f"{server.inference}: {error}", False
        return {"ui": {"text": [told]}, "result": (told, running)}


def _text(status: dict[str, Any]) -> str:
    lines = [f"{status['address']}: {status['requests_per_second']:.1f} requests a second"]
    for model in status["models"]:
        workers = "; ".join(_worker(worker) for worker in model["workers"])
        lines.append(f"{model['name']}: {workers or 'not loaded'}")
    lines += [f"{name}: {value:,g}" for name, value in status["counters"].items()]
    return "\n".join(lines)


def _worker(worker: dict[str, Any]) -> str:
    if worker["state"] != "ready":
        return f"{worker['state']}: {worker['reason']}"
    megabytes = worker["weights_bytes"] / 1e6
    return f"{worker['device']} {worker['dtype']}, {megabytes:,.0f} MB, {worker['requests']} requests"


NODES = {"LunaServerStatus": LunaServerStatus}
