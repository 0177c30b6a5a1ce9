"""Tells empty pictures (a failed decode, a flat colour) from pictures, by numbers that mean the same for every size."""

from typing import Literal

import numpy as np

Gate = Literal["disabled", "variance", "edge_density", "both"]

# An ordinary photograph deviates by a quarter of the range and has a twentieth of its pixels on edges.
_FULL_DEVIATION = 0.25
_FULL_EDGES = 0.05
_EDGE = 0.05


def quality(picture: np.ndarray, gate: Gate) -> float | None:
    """The score of a picture [H, W, C], uint8 or floating 0..1: 0 flat, 1 like a photograph or livelier; None when
    disabled.

    variance: the standard deviation of the luminance over 0.25. edge_density: the share of pixels whose luminance
    changes by more than 0.05 to a neighbour below or to the right, over 0.05. both: the smaller of the two.
    """
    if gate == "disabled":
        return None
    if picture.dtype == np.uint8:
        picture = picture / np.float32(255)
    luminance = picture[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    scores = []
    if gate in ("variance", "both"):
        scores.append(float(luminance.std()) / _FULL_DEVIATION)
    if gate in ("edge_density", "both"):
        down = np.abs(np.diff(luminance, axis=0))[:, :-1]
        right = np.abs(np.diff(luminance, axis=1))[:-1]
        scores.append(float((np.maximum(down, right) > _EDGE).mean()) / _FULL_EDGES if down.size else 0.0)
    return min(1.0, *scores)
