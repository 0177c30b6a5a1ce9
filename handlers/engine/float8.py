"""Rounding to float8 as ComfyUI stores merged weights: up or down at random, in proportion to the distance."""

import torch
from torch import Tensor

# {dtype: (bits of the mantissa, bias of the exponent)}
FLOAT8 = {torch.float8_e4m3fn: (3, 7), torch.float8_e5m2: (2, 15)}
_SLICE_ELEMENTS = 4096 * 4096


def round_to_float8(value: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """`value` (float32) as `dtype`, the same for the same seed, device and shape.

    Works in half precision and draws its numbers slice by slice along the first dimension, as ComfyUI does: both decide
    which numbers a weight meets.
    """
    generator = torch.Generator(value.device).manual_seed(seed)
    rows = max(1, round(value.shape[0] / max(1, value.numel() / _SLICE_ELEMENTS)))
    rounded = torch.empty_like(value, dtype=dtype)
    for start in range(0, value.shape[0], rows):
        rounded[start : start + rows] = _on_grid(value[start : start + rows].half(), dtype, generator)
    return rounded


def _on_grid(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """The neighbours of `value` (half) among dtype's numbers, each chosen with a probability that keeps the mean."""
    bits, bias = FLOAT8[dtype]
    size = value.abs()
    exponent = size.log2().floor().clamp(-bias, 2 ** (7 - bits) - 1 - bias)
    normal = exponent > -bias
    unit = torch.where(normal, 2.0**exponent, 2.0 ** (1 - bias))
    steps = torch.where(normal, (size / unit - 1.0) * 2**bits, size / 2.0 ** (1 - bias - bits))
    steps += torch.rand(steps.shape, dtype=steps.dtype, device=steps.device, generator=generator)
    result = unit * (normal + steps.floor() / 2**bits) * value.sign()
    limits = torch.finfo(dtype)
    return result.clamp(limits.min, limits.max)
