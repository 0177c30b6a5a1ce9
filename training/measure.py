"""What a painted picture shows: shape, colour and background, measured and not guessed by another network."""

from functools import cache

import numpy as np

from training.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZE, Thing, coverage

GRID = 24  # cells along each side of the normalised silhouette


@cache
def _templates() -> np.ndarray:
    """Silhouettes of the shapes, cut to their bounding boxes: float64 [shapes, GRID, GRID]."""
    return np.stack([_normalised(coverage(Thing(shape, "", SIZE / 2, SIZE / 2, 48))) for shape in SHAPES])


def _normalised(silhouette: np.ndarray) -> np.ndarray:
    """A silhouette [SIZE, SIZE] in 0..1, its bounding box stretched to [GRID, GRID]."""
    rows, columns = np.where(silhouette > 0.5)
    ys = np.linspace(rows.min(), rows.max(), GRID).round().astype(int)
    xs = np.linspace(columns.min(), columns.max(), GRID).round().astype(int)
    return silhouette[np.ix_(ys, xs)]


def _nearest(colour: np.ndarray, palette: dict[str, tuple[float, float, float]]) -> str:
    return min(palette, key=lambda name: np.linalg.norm(colour - np.asarray(palette[name])))


def look(picture: np.ndarray) -> tuple[str, str, str]:
    """`(shape, colour, background)` of a picture of one thing, float [SIZE, SIZE, 3] in 0..1; shape and colour are ""
    when all is background.

    The background is the palette's colour nearest to the border's median. What differs from it is the silhouette; its
    colour is the palette's nearest to the median of what differs most, its shape the template with the smallest mean
    difference.
    """
    border = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3), picture[:, :4].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    background = _nearest(ground, BACKGROUNDS)
    difference = np.linalg.norm(picture - ground, axis=2)
    if (difference > 0.2).sum() < 64:
        return "", "", background
    strongest = difference >= np.quantile(difference[difference > 0.2], 0.5)
    inked = np.median(picture[strongest], axis=0)
    direction = (inked - ground) / np.sum((inked - ground) ** 2)
    silhouette = np.clip((picture - ground) @ direction, 0, 1)
    errors = np.abs(_templates() - _normalised(silhouette)).mean(axis=(1, 2))
    return SHAPES[int(errors.argmin())], _nearest(inked, COLOURS), background
