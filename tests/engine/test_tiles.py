import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tiles import tiled


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), tile=st.integers(1, 20), overlap=st.integers(0, 19))
def test_a_pointwise_function_does_not_notice_tiles(height, width, tile, overlap):
    image = torch.arange(height * width, dtype=torch.float32).reshape(1, 1, height, width)
    blended = tiled(image, lambda part: part * 2 + 1, tile, overlap, (1, 1))
    torch.testing.assert_close(blended, image * 2 + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [(8, 1), (1, 8)])
def test_magnification(scale):
    up, down = scale
    image = torch.rand(2, 3, 320, 264)

    def resize(part):
        return torch.nn.functional.interpolate(part, scale_factor=up / down, mode="nearest")

    torch.testing.assert_close(tiled(image, resize, 128, 24, scale), resize(image))


def test_no_tile_is_larger_than_asked():
    sizes = []
    tiled(torch.zeros(1, 1, 100, 70), lambda part: sizes.append(part.shape[2:]) or part, 32, 8, (1, 1))
    assert max(max(size) for size in sizes) <= 32
