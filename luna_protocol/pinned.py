"""Shared memory page-locked for CUDA: a GPU then copies from and to it at the bus's speed, and nobody waits meanwhile.

Only where this process computes on a GPU; elsewhere nothing is locked, and the same copies are plain ones.
"""

import logging
import mmap
from collections.abc import Callable
from contextlib import suppress

import torch

log = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device of this process


def pin(memory: mmap.mmap) -> Callable[[], object]:
    """Page-locks `memory` if this process uses CUDA. What it returns has to be called before the memory is unmapped:
    CUDA would take what is mapped there next for locked."""
    if not torch.cuda.is_initialized():
        return _nothing
    cudart = torch.cuda.cudart()
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    refused = int(cudart.cudaHostRegister(address, len(memory), _PORTABLE))
    if refused:
        log.warning("CUDA does not page-lock %d bytes (error %d): copies are slower", len(memory), refused)
        # The runtime keeps the error and tells it to the next kernel, whosever it is.
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return _nothing
    return lambda: cudart.cudaHostUnregister(address)


def _nothing() -> None:
    pass
