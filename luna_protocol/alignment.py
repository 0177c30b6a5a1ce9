"""Tensors that begin where torch's own do.

Some matrix products of one or two rows round otherwise when a weight or an input begins elsewhere (MKL on AMD: not at a
multiple of 16 bytes). What ComfyUI computes with lies in torch's own memory; what is mapped from a file or viewed in a
request begins wherever a header happens to end.
"""

from torch import Tensor

ALIGNMENT = 64  # bytes, of torch's allocations on a CPU; those on a GPU are coarser


def is_aligned(tensor: Tensor) -> bool:
    """Whether `tensor` begins at a multiple of `ALIGNMENT` bytes."""
    return tensor.data_ptr() % ALIGNMENT == 0


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it where it is not aligned."""
    return tensor if is_aligned(tensor) else tensor.clone()
