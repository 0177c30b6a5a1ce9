"""The gate judges pictures of 0..1: the origin's took them for 0..255 and threw everything away."""

import numpy as np
import pytest

from luna_pictures.quality_gate import quality

GATES = ("variance", "edge_density", "both")


def photo(size: int) -> np.ndarray:
    """Shapes before a gradient, with some grain."""
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j].astype(np.float32)
    picture = np.stack([x, y, 1 - x], axis=-1) * 0.6
    for n in range(24):
        cx, cy, r = (n * 0.37) % 1, (n * 0.61) % 1, 0.02 + (n % 5) * 0.02
        picture[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = [(n % 3) / 2, (n % 4) / 3, (n % 5) / 4]
    return picture + np.random.default_rng(0).normal(scale=0.01, size=picture.shape).astype(np.float32)


@pytest.mark.parametrize("gate", GATES)
def test_a_picture_passes_and_emptiness_does_not(gate):
    assert quality(photo(256), gate) > 0.3
    for flat in (0.0, 0.5, 1.0):
        assert quality(np.full((64, 64, 3), flat, np.float32), gate) == 0
    grain = 0.5 + np.random.default_rng(1).normal(scale=0.01, size=(64, 64, 3)).astype(np.float32)
    assert quality(grain, gate) < 0.3


@pytest.mark.parametrize("gate", GATES)
def test_scores_stay_between_0_and_1_for_any_size(gate):
    for shape in ((1, 1, 3), (1, 9, 3), (64, 64, 4)):
        assert 0 <= quality(np.random.default_rng(2).random(shape, np.float32), gate) <= 1


def test_both_asks_for_both():
    smooth = np.linspace(0, 1, 256, dtype=np.float32)[None, :, None].repeat(256, 0).repeat(3, 2)
    assert quality(smooth, "variance") > 0.9
    assert quality(smooth, "edge_density") == quality(smooth, "both") == 0


def test_disabled_gives_no_score():
    assert quality(photo(64), "disabled") is None
