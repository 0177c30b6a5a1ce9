"""Rows of one evaluation in several requests, where together they are more than the server takes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from luna_protocol import MAX_BODY_BYTES
from luna_protocol.blob import MAX_HEADER_BYTES
from luna_protocol.errors import OutOfMemory, TooLarge

PART_BYTES = 48 << 20  # of LoRAs, the largest part that a request has to have room for beside its rows


def in_groups(ask: Callable[[list[int], str], Tensor], rows: int, conds: int, most: int) -> tuple[Tensor, int]:
    """The rows' answers in their order, and how many rows a request may have, as far as refusals show.

    Args:
        ask: the answer to the rows at these indices; the name beside them says which group of how many they are, and
            is empty for all rows at once.
        rows: `conds` blocks of the same latents; a number of its own where it is no multiple of that.
        most: rows of the largest request to try; halved where the server has no room for them.

    Raises:
        TooLarge, OutOfMemory: a single row is too much.
    """
    while True:
        groups = row_groups(rows, conds, most)
        try:
            if len(groups) == 1:
                return ask(groups[0], ""), most
            parts = [ask(group, f"{index} of {len(groups)}") for index, group in enumerate(groups)]
        except (TooLarge, OutOfMemory):
            most = max(map(len, groups)) // 2
            if not most:
                raise
        else:
            order = torch.tensor([row for group in groups for row in group]).argsort()
            return torch.cat(parts)[order.to(parts[0].device)], most


def rows_in_a_body(tensors: Mapping[str, Tensor]) -> int:
    """How many of these rows an HTTP body holds beside a part of a LoRA and the message; at least 1."""
    rows = len(next(iter(tensors.values())))
    row_bytes = sum(tensor.nbytes for tensor in tensors.values()) // rows
    return max(1, (MAX_BODY_BYTES - PART_BYTES - MAX_HEADER_BYTES) // row_bytes)


def row_groups(rows: int, conds: int, most: int) -> list[list[int]]:
    """Indices of rows in even groups of at most `most`. The conds of a latent stay together where they can: a step
    cache has them hit or miss together."""
    if rows % conds:
        conds = 1
    latents = rows // conds
    if conds <= most:
        return [[cond * latents + i for cond in range(conds) for i in part] for part in _parts(latents, most // conds)]
    return [[cond * latents + i for cond in part] for i in range(latents) for part in _parts(conds, most)]


def _parts(count: int, most: int) -> list[range]:
    parts = -(-count // most)
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
