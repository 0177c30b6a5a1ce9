"""What the nodes' lists offer, and when a node whose choice is served has to run again."""

from comfy_client import settings
from comfy_client.catalog import Catalog, checkpoints, find
from comfy_client.loras import known_here
from luna_protocol.errors import LunaError

_CATALOG = Catalog()


def files(role: str) -> list[str]:
    """Files of which the server can serve the part `role`; none while it is away."""
    return checkpoints(_CATALOG.index(settings.server()), role)


def loras() -> list[str]:
    """The server's LoRAs and ComfyUI's own."""
    return sorted({*loras_on_server(), *known_here()})


def loras_on_server() -> list[str]:
    """The server's LoRAs; none while it is away."""
    return _CATALOG.index(settings.server()).loras


def identity(chosen: dict[str, str]) -> str:
    """Changes when one of {role: file} is another file than before, was unloaded, or the server came or went."""
    try:
        index = settings.server().index()
        models = [find(index, role, file) for role, file in chosen.items()]
    except LunaError as error:
        return str(error)
    return " ".join(f"{model.name} {model.fingerprint} {bool(model.workers)}" for model in models)
