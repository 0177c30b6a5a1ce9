"""Plain text to CLIP's token ids, in sections of 77 as ComfyUI makes them; no weights syntax."""

from functools import cache

import torch
from instant_clip_tokenizer import Tokenizer

START, END = 49406, 49407
SECTION = 77
_ROOM = SECTION - 2
_LONG_WORD = 8  # ComfyUI's bound: shorter words move to the next section whole, longer ones are split


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer()


def count_sections(texts: list[str]) -> int:
    """How many rows of 77 tokens `sections` makes of these texts."""
    return len(texts) * max(len(_split(text)) for text in texts)


def sections(texts: list[str], pad: int) -> torch.Tensor:
    """Token ids [len(texts), S, 77], int64; S is what the longest text needs, shorter ones get empty sections.

    pad: id behind the end token, 49407 for CLIP-L and 0 for OpenCLIP-G.
    """
    split = [_split(text) for text in texts]
    count = max(map(len, split))
    rows = [[_row(ids, pad) for ids in parts + [[]] * (count - len(parts))] for parts in split]
    return torch.tensor(rows, dtype=torch.int64)


def _row(ids: list[int], pad: int) -> list[int]:
    return [START, *ids, END] + [pad] * (_ROOM - len(ids))


def _split(text: str) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for word in text.split():
        ids = _tokenizer().encode(word)
        while ids:
            room = _ROOM - len(parts[-1])
            if len(ids) > room and len(ids) < _LONG_WORD:
                parts.append([])
                room = _ROOM
            parts[-1] += ids[:room]
            ids = ids[room:]
            if ids:
                parts.append([])
    return parts
