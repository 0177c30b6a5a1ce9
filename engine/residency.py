"""Which models' weights are on the device, within one budget: the least recently used make room, by parking."""

import logging
import time

import torch

from engine.memory_budget import gigabytes
from engine.role import Role
from luna_protocol.errors import NotLoaded, OutOfMemory

log = logging.getLogger(__name__)

RUN_SECONDS = 20.0  # a model used within these is taken to be in the middle of a sampling run


class Residency:
    """Not thread-safe: the compute thread alone calls it.

    Args:
        device: whose memory it is.
        key: what the device is called in budgets.
        budget: bytes that weights and caches may take together; None for no bound. Activations come on top.
    """

    def __init__(self, device: torch.device, key: str, budget: int | None):
        self.device, self.key, self.budget = device, key, budget
        self._used: dict[Role, float] = {}

    def reserve(self, name: str, nbytes: int) -> None:
        """Makes room for a model that is about to load.

        Raises:
            OutOfMemory: it is larger than the whole budget.
        """
        if self.budget is not None and nbytes > self.budget:
            raise OutOfMemory(
                f"{name} needs {gigabytes(nbytes)} on {self.key}, whose budget is {gigabytes(self.budget)}",
                "take a smaller dtype, or raise serve.py --memory",
            )
        self._make_room(nbytes)

    def add(self, role: Role) -> None:
        self._used[role] = time.monotonic()

    def remove(self, role: Role) -> None:
        self._used.pop(role, None)

    def bring(self, role: Role) -> None:
        """Has the weights of `role` on the device, to be used now.

        Raises:
            NotLoaded: it was removed.
            Broken: its file is no longer what was loaded.
        """
        if role not in self._used:  # a request that came as its model went
            raise NotLoaded(f"{role.name} was unloaded", "load it again")
        # Caches grow beside weights that are there, too.
        self._make_room(0 if role.weights.resident else role.weights.nbytes, role)
        if not role.weights.resident:
            if role.file and self.device.type == "cpu":
                role.file.check_same()
            begun = time.monotonic()
            role.weights.unpark(self.device)
            log.info("%s is back after %.3f s", role.name, time.monotonic() - begun)
        self._used[role] = time.monotonic()

    def free_caches(self) -> None:
        """Frees what the models keep only to save time."""
        for role in self._used:
            role.drop_caches()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def held(self) -> int:
        """Bytes of weights and caches on the device."""
        return sum(role.weights.nbytes * role.weights.resident + role.caches_bytes() for role in self._used)

    def _make_room(self, nbytes: int, sparing: Role | None = None) -> None:
        """Parks what was used longest ago until `nbytes` fit; what is in the middle of a run only if nothing else
        makes room."""
        if self.budget is None or self.held() + nbytes <= self.budget:
            return
        now = time.monotonic()
        others = [
            role
            for role in self._used
            if role is not sparing and role.weights.resident and not role.weights.kept.locked()
        ]
        for role in sorted(others, key=lambda role: (now - self._used[role] < RUN_SECONDS, self._used[role])):
            if self.held() + nbytes <= self.budget:
                return
            log.info("%s makes room", role.name)
            role.drop_caches()
            role.weights.park()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
