"""What the nodes offer for choice: the server's checkpoints and LoRAs, by their file names."""

import math
import os
import threading
import time
from collections.abc import Iterable

from luna_client.server import Server
from luna_protocol.errors import LunaError, NotFound
from luna_protocol.messages import Index, ServedModel
from luna_protocol.model_names import first_replica

_FRESH_SECONDS = 2.0
_SAME_WORKFLOW_SECONDS = 1.0


class Catalog:
    """The server's index as it was last seen. Threads of the catalog's own look: nobody who asks waits for a network.

    While the server does not answer, what was last seen of it stays.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: Server | None = None
        self._index = Index(models=[])
        self._seen = -math.inf
        self._look = threading.Thread()

    def index(self, server: Server) -> Index:
        """The last look's, empty before there was one; begins another where that is older than two seconds."""
        with self._lock:
            if self._of is not server:
                self._of, self._index, self._seen = server, Index(models=[]), -math.inf
            elif self._look.is_alive() or time.monotonic() - self._seen < _FRESH_SECONDS:
                return self._index
            self._look = threading.Thread(target=self._see, args=(server,), name="luna catalog", daemon=True)
            self._look.start()
            return self._index

    def refreshed(self, server: Server, seconds: float) -> Index:
        """As `index`, after waiting up to `seconds` for a look that is under way."""
        self.index(server)
        self._look.join(seconds)
        return self.index(server)

    def _see(self, server: Server) -> None:
        try:
            index = server.index()
        except LunaError:
            index = None
        with self._lock:
            if self._of is server:
                self._index, self._seen = index or self._index, time.monotonic()


class Look:
    """The server's index as it is now. A look that failed counts for the workflow's next nodes too: each would wait as
    long for a server that hangs."""

    def __init__(self) -> None:
        self._failed: tuple[Server, float, LunaError] | None = None

    def now(self, server: Server) -> Index | LunaError:
        """The index, or why there is none."""
        if self._failed:
            of, at, failure = self._failed
            if of is server and time.monotonic() - at < _SAME_WORKFLOW_SECONDS:
                return failure
        try:
            return server.index()
        except LunaError as failure:
            self._failed = server, time.monotonic(), failure
            return failure


def checkpoints(index: Index, role: str) -> list[str]:
    """Files of which the server can serve the part `role`, loaded or not."""
    return sorted({model.checkpoint for model in index.models if model.role == role and model.checkpoint})


def find(index: Index, role: str, checkpoint: str) -> ServedModel:
    """The served model for a part of a checkpoint; its first replica where there are several.

    Raises:
        NotFound: the store has no archive for it.
    """
    for spelling in (checkpoint, checkpoint.replace("\\", "/")):  # a workflow may come from Windows
        for model in index.models:
            if model.role == role and model.checkpoint == spelling and first_replica(model.name) == model.name:
                return model
    known = ", ".join(checkpoints(index, role)) or "none"
    raise NotFound(
        f"the server has no {role} of {checkpoint!r}",
        f"SD1.5 and SDXL can be served; it has: {known}. scripts/add_checkpoint.py adds one",
    )


def spelt_once(served: Iterable[str], own: Iterable[str]) -> list[str]:
    """Files of the server and of ComfyUI, each once: on Windows, ComfyUI writes backslashes in its own."""
    own = set(own)
    slashed = {name.replace(os.sep, "/") for name in own}
    return sorted({*own, *(name for name in served if name not in slashed)})


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
