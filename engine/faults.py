"""What becomes of a forward that fails: memory is freed and it runs once more, a broken device ends the engine, and all
else is an error of that request alone. No error keeps a traceback, which would keep the forward's tensors."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from engine.residency import Residency
from engine.role import Role
from engine.scheduler import Abandoned
from luna_protocol.errors import Internal, LunaError, OutOfMemory

log = logging.getLogger(__name__)

BROKEN_DEVICE = 70  # exit status
# What CUDA says from then on to every call of this process, whatever it asks.
_STICKY = ("illegal memory access", "device-side assert", "unspecified launch failure", "uncorrectable ECC", "is lost")


class Faults:
    """The scheduler's `Guard`.

    Args:
        end: ends this process; called where its device is lost to it.
    """

    def __init__(self, residency: Residency, end: Callable[[int], Any] = os._exit):
        self._residency = residency
        self._end = end

    def ready(self, role: Role) -> None:
        self.run(role, lambda: self._residency.bring(role))

    def run(self, role: Role, function: Callable[[], Any]) -> Any:
        """What `function` returns.

        Raises:
            LunaError: what it came to.
            Abandoned: as `function` did.
        """
        outcome = self._tried(role, function)
        if isinstance(outcome, torch.OutOfMemoryError):
            log.warning("%s ran out of memory: caches go, and it is tried again", role.name)
            self._residency.free_caches()
            outcome = self._tried(role, function)
        if isinstance(outcome, torch.OutOfMemoryError):
            told = str(outcome).split("\n")[0][:300]
            raise OutOfMemory(f"{role.device} has no memory left for this: {told}", "a smaller size or batch may fit")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _tried(self, role: Role, function: Callable[[], Any]) -> Any:
        """What it returns, or an exception that holds no frames."""
        try:
            return function()
        except (LunaError, Abandoned, torch.OutOfMemoryError) as error:
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)
        except Exception as error:
            log.exception("a request of %s failed", role.name)
            if is_sticky(error):
                log.critical("%s is lost to this process, which ends", role.device)
                self._end(BROKEN_DEVICE)
            return Internal(f"{type(error).__name__}: {error}", "the server's log has the whole story")


def is_sticky(error: Exception) -> bool:
    """Whether the device answers nothing else from now on."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _STICKY)
