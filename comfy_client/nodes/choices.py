"""What the nodes' lists offer, and when a node whose choice is served has to run again.

ComfyUI asks for the lists in the thread that serves its pages, which must never wait for a network.
"""

from comfy_client import settings
from comfy_client.catalog import Catalog, checkpoints, find, spelt_once
from comfy_client.loras import known_here
from luna_protocol.errors import LunaError

_CATALOG = Catalog()
_PATIENCE_SECONDS = 2.0  # of somebody who opens ComfyUI's page, or presses R


def files(role: str) -> list[str]:
    """Files of which the server can serve the part `role`, as it was last seen."""
    return checkpoints(_CATALOG.index(settings.server()), role)


def loras() -> list[str]:
    """The server's LoRAs and ComfyUI's own."""
    return spelt_once(_CATALOG.index(settings.server()).loras, known_here())


def loras_on_server() -> list[str]:
    """The server's LoRAs, for a run, which may wait."""
    return _CATALOG.refreshed(settings.server(), 10).loras


def refresh() -> None:
    """Look at the server again, before the lists are asked for. May wait."""
    _CATALOG.refreshed(settings.server(), _PATIENCE_SECONDS)


def identity(chosen: dict[str, str]) -> str:
    """Changes when one of {role: file} is another file than before, was unloaded, or the server came or went."""
    try:
        index = settings.server().index()
        models = [find(index, role, file) for role, file in chosen.items()]
    except LunaError as error:
        return str(error)
    return " ".join(f"{model.name} {model.fingerprint} {bool(model.workers)}" for model in models)
