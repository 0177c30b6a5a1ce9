"""One served model in several replicas, each on devices of its own."""

import random
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from luna_client.server import Server
from luna_protocol.errors import NotFound, Unavailable
from luna_protocol.messages import Request, ServedModel


class Replicas:
    """Calls one of a model's replicas, and stays with it until told to look again or until it fails.

    Args:
        names: of the served models; with one alone, the server is never asked which is free.
    """

    def __init__(self, server: Server, names: tuple[str, ...]) -> None:
        self.server = server
        self._names = names
        self.current = names[0]

    def settle(self) -> None:
        """Take the replica that is least busy now: the current one where no other is less, as its caches are warm."""
        if len(self._names) > 1:
            self._settle_among(self._names)

    def call(self, request: Request, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As `Server.call`; by another replica when the current one cannot answer."""
        try:
            return self.server.call(self.current, request, tensors)
        except (NotFound, Unavailable):
            others = [name for name in self._names if name != self.current]
            if not others or not self._settle_among(others):
                raise
            return self.server.call(self.current, request, tensors)

    def _settle_among(self, names: Iterable[str]) -> bool:
        """Whether one of them can answer."""
        busy = {model.name: _busy(model) for model in self.server.index().models if model.name in names}
        ready = [name for name, share in busy.items() if share is not None]
        if ready:
            self.current = min(ready, key=lambda name: (busy[name], name != self.current, random.random()))
        return bool(ready)


def _busy(model: ServedModel) -> float | None:
    """Which share of its workers computes; None where none is ready."""
    ready = [worker for worker in model.workers if worker.state == "ready"]
    return sum(worker.busy for worker in ready) / len(ready) if ready else None
