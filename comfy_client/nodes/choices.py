"""What the nodes' lists offer, and when a node whose choice is served has to run again.

ComfyUI asks for the lists in the thread that serves its pages, which must never wait for a network. Whether a node has
to run again, it asks in the thread that runs workflows, of one node after the other.
"""

import time
from collections.abc import Iterable

from comfy_client import loras as lora_files
from comfy_client import settings
from comfy_client.catalog import Catalog, Look, checkpoints, find, spelt_once
from luna_protocol.errors import LunaError

_CATALOG, _LOOK = Catalog(), Look()
_PATIENCE_SECONDS = 2.0  # of somebody who opens ComfyUI's page, or presses R


def files(role: str) -> list[str]:
    """Files of which the server can serve the part `role`, as it was last seen."""
    return checkpoints(_CATALOG.index(settings.server()), role)


def loras() -> list[str]:
    """The server's LoRAs and ComfyUI's own."""
    return spelt_once(_CATALOG.index(settings.server()).loras, lora_files.known_here())


def refresh() -> None:
    """Look at the server again, before the lists are asked for. May wait."""
    _CATALOG.refreshed(settings.server(), _PATIENCE_SECONDS)


def identity(chosen: dict[str, str]) -> str:
    """Changes when one of {role: file} is another file than before or another server's, when the server came or went,
    and always while one is not loaded: the node that runs has it loaded."""
    server = settings.server()
    index = _LOOK.now(server)
    if isinstance(index, LunaError):
        return str(index)
    try:
        models = [find(index, role, file) for role, file in chosen.items()]
    except LunaError as error:
        return str(error)
    if not all(model.workers for model in models):
        return f"not loaded at {time.time_ns()}"  # never the same: it may have been loaded and gone in between
    return " ".join((server.inference, *(f"{model.name} {model.fingerprint}" for model in models)))


def lora_identity(names: Iterable[str] | None) -> str:
    """Changes when one of these LoRAs (None: any that there is) is another file than before; "" for none at all."""
    names = None if names is None else list(names)
    if names == []:
        return ""
    index = _LOOK.now(settings.server())
    # Without a server, a node that needs it says so when it runs.
    return lora_files.identity(names, {} if isinstance(index, LunaError) else index.lora_fingerprints)
