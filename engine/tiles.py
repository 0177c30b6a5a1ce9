"""Applying a function to a large image tile by tile, blended so that no seam shows."""

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(
    image: Tensor, function: Callable[[Tensor], Tensor], tile: int, overlap: int, scale: tuple[int, int]
) -> Tensor:
    """`function` over `image` [B, C, H, W] in tiles of at most `tile` x `tile`, neighbours sharing at least `overlap`.

    Where tiles overlap their outputs are averaged with weights that fall linearly towards each tile's inner edges.

    Args:
        image: H and W such that H * scale is whole.
        function: maps [B, C, h, w] to [B, c, h * scale, w * scale].
        tile, overlap: in positions of `image`.
        scale: the function's magnification as (numerator, denominator).
    """
    up, down = scale
    # Tiles have to begin on whole output positions.
    tile, overlap = max(tile // down, 1) * down, max(overlap // down, 0) * down
    overlap = min(overlap, tile - down)
    rows, columns = (_starts(size, tile, overlap, down) for size in image.shape[2:])
    total = weight = None
    for top in rows:
        for left in columns:
            part = function(image[:, :, top : top + tile, left : left + tile]).float()
            if total is None:
                height, width = (size * up // down for size in image.shape[2:])
                total = part.new_zeros(*part.shape[:2], height, width)
                weight = part.new_zeros(1, 1, height, width)
            y, x = top * up // down, left * up // down
            ramp = overlap * up // down
            window = _window(part.shape[2], y, total.shape[2], ramp, part)[:, None] * _window(
                part.shape[3], x, total.shape[3], ramp, part
            )
            total[:, :, y : y + part.shape[2], x : x + part.shape[3]] += part * window
            weight[:, :, y : y + part.shape[2], x : x + part.shape[3]] += window
    return total / weight


def _starts(size: int, tile: int, overlap: int, step: int) -> list[int]:
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    # Spread evenly, so that no tile at the end repeats nearly all of its neighbour.
    return [round((size - tile) / (count - 1) / step * index) * step for index in range(count)]


def _window(length: int, start: int, size: int, ramp: int, like: Tensor) -> Tensor:
    """Weights of one tile along one side: rising over `ramp` unless the tile lies at the picture's edge."""
    position = torch.arange(1, length + 1, device=like.device, dtype=torch.float32)
    rise = position if start > 0 else torch.full_like(position, float(ramp + 1))
    fall = position.flip(0) if start + length < size else torch.full_like(position, float(ramp + 1))
    return torch.minimum(rise, fall).clamp(max=ramp + 1) / (ramp + 1)
