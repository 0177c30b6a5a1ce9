"""How this process's memory allocator treats what a forward frees."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_KEPT = 1 << 30
_OLD_LIMIT = 32 << 20  # older glibc takes no larger threshold for mapping


def keep_freed_memory() -> None:
    """Has glibc keep up to 1 GiB of freed memory for the next allocation, whichever thread makes it.

    By itself it maps large tensors one by one and gives each back to the system when it is freed, so that every step of
    a sampler has its activations' pages cleared and mapped anew: 20 to 30 % of a forward on a CPU. Threads other than
    the first would get arenas of their own, of 64 MB pieces, where this does not hold. Other systems' allocators are
    left alone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_ARENA_MAX, 1)
    # In this order: with a fixed threshold for trimming alone, all that is large would be mapped for ever.
    if mallopt and any(mallopt(_MMAP_THRESHOLD, size) for size in (_KEPT, _OLD_LIMIT)):
        mallopt(_TRIM_THRESHOLD, _KEPT)
