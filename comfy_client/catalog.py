"""What the nodes offer for choice: the server's checkpoints and LoRAs, by their file names."""

import time

from comfy_client.server import Server
from luna_protocol.errors import LunaError, NotFound
from luna_protocol.messages import Index, ServedModel
from luna_protocol.model_names import first_replica

_FRESH_SECONDS = 2.0


class Catalog:
    """The server's index, read again when older than two seconds; empty while the server cannot be reached."""

    def __init__(self) -> None:
        self._of: Server | None = None
        self._read = 0.0
        self._index = Index(models=[])

    def index(self, server: Server) -> Index:
        if self._of is not server or time.monotonic() - self._read > _FRESH_SECONDS:
            try:
                self._index = server.index()
            except LunaError:
                self._index = Index(models=[])
            self._of, self._read = server, time.monotonic()
        return self._index


def checkpoints(index: Index, role: str) -> list[str]:
    """Files of which the server can serve the part `role`, loaded or not."""
    return sorted({model.checkpoint for model in index.models if model.role == role and model.checkpoint})


def find(index: Index, role: str, checkpoint: str) -> ServedModel:
    """The served model for a part of a checkpoint; its first replica where there are several.

    Raises:
        NotFound: the store has no archive for it.
    """
    for model in index.models:
        if model.role == role and model.checkpoint == checkpoint and first_replica(model.name) == model.name:
            return model
    known = ", ".join(checkpoints(index, role)) or "none"
    raise NotFound(
        f"the server has no {role} of {checkpoint!r}", f"it has: {known}. scripts/add_checkpoint.py adds one"
    )


def replicas(index: Index, model: ServedModel) -> list[ServedModel]:
    """The model and its further replicas: NAME.unet, NAME.unet.1, NAME.unet.2 ..."""
    return [other for other in index.models if first_replica(other.name) == model.name]


def match_lora(wanted: str, known: list[str]) -> str | None:
    """The one of `known` (paths relative to a LoRA folder) that a prompt or node means by `wanted`.

    The whole path, the path without its ending, or the bare file name will do, in this order.

    Raises:
        NotFound: `wanted` is a bare name that several folders have.
    """
    slashed = wanted.replace("\\", "/")
    by_path = {name.replace("\\", "/"): name for name in known}
    for candidate in (slashed, f"{slashed}.safetensors"):
        if candidate in by_path:
            return by_path[candidate]
    ends = (f"/{slashed}", f"/{slashed}.safetensors")
    found = [name for path, name in by_path.items() if f"/{path}".endswith(ends)]
    if len(found) > 1:
        raise NotFound(f"{wanted!r} could be {' or '.join(sorted(found))}", "give the folder too")
    return found[0] if found else None
