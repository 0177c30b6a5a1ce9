import pytest
import torch
from diffusers.utils.torch_utils import apply_freeu

from engine.free_u import reweigh
from luna_protocol.messages import FreeU
from tests.engine.test_unet import arguments, load

SCALES = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}


def tensors(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 6, 10, generator=generator), torch.randn(2, 24, 6, 10, generator=generator)


@pytest.mark.parametrize(("channels", "place"), [(64, 0), (32, 1)])
def test_version_1_is_that_of_diffusers(channels: int, place: int) -> None:
    h, skip = tensors(channels)
    ours = reweigh(h, skip, 16, FreeU(version=1, **SCALES))
    theirs = apply_freeu(place, h.clone(), skip.clone(), **SCALES)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[0], h) and not torch.equal(ours[1], skip)


def test_version_2_amplifies_by_the_mean_of_each_picture() -> None:
    h, skip = tensors(64)
    ours, _ = reweigh(h, skip, 16, FreeU(version=2, **SCALES))
    for row in range(2):
        mean = h[row].mean(0)
        factor = 0.3 * (mean - mean.min()) / (mean.max() - mean.min()) + 1
        assert torch.allclose(ours[row, :32], h[row, :32] * factor)
        assert torch.equal(ours[row, 32:], h[row, 32:])
        alone, _ = reweigh(h[[row]], skip[[row]], 16, FreeU(version=2, **SCALES))
        assert torch.equal(alone[0], ours[row])


def test_other_widths_pass() -> None:
    h, skip = tensors(48)
    assert reweigh(h, skip, 16, FreeU(version=2, **SCALES)) == (h, skip)


def test_the_unet_applies_each_in_turn(tiny, noise) -> None:
    unet = load(tiny, "tiny_sd15")
    x, steps, context, _ = arguments(unet, noise, 2, (8, 8))
    one, other = FreeU(version=1, **SCALES), FreeU(version=2, **SCALES)
    outs = [unet.forward(x, steps, context, free_u=chosen) for chosen in ((), (one,), (other,), (one, other))]
    assert all(not torch.equal(a, b) for i, a in enumerate(outs) for b in outs[:i])
