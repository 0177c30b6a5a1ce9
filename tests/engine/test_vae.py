import pytest
import torch

from engine.checkpoints import detect, read_header
from engine.vae import VAE
from luna_protocol.errors import Impossible
from luna_protocol.messages import Tiling
from tests import checkpoints, reference
from tests.engine.conftest import CPU


@pytest.fixture
def kl(tiny):
    path, parts = tiny("tiny_sd15")
    return VAE.load(path, parts["vae"], torch.float32, CPU)


@pytest.mark.parametrize(("rows", "sides"), [(1, (8, 8)), (4, (13, 9))])
def test_equals_diffusers_bit_for_bit(tiny, kl, noise, rows, sides):
    theirs = reference.vae(tiny("tiny_sd15")[0], "tiny_sd15")
    latent, pixels = noise(rows, 4, *sides), noise(rows, 3, sides[0] * 8, sides[1] * 8)
    assert torch.equal(kl.decode(latent), theirs.decode(latent).sample)
    assert torch.equal(kl.encode(pixels), theirs.encode(pixels).latent_dist.mode())


@pytest.fixture
def taesd(tmp_path):
    path = checkpoints.write(tmp_path / "taesd.safetensors", "tiny_sd15", vae=checkpoints.TAESD)
    return VAE.load(path, detect(read_header(path)).parts["vae"], torch.float32, CPU)


def test_taesd_layout_is_scaled(taesd, noise):
    latent, pixels = noise(1, 4, 5, 6), noise(1, 3, 40, 48)
    assert taesd.scale == pytest.approx(0.18215)
    assert torch.equal(taesd.decode(latent), taesd.model.decode(latent * taesd.scale).sample)
    assert torch.equal(taesd.encode(pixels), taesd.model.encode(pixels).latents / taesd.scale)


def test_one_tile_is_the_whole(kl, noise):
    latent, pixels = noise(2, 4, 16, 12), noise(1, 3, 128, 96)
    tiling = Tiling(tile_size=128, overlap=32)
    assert torch.allclose(kl.decode(latent, tiling), kl.decode(latent), atol=1e-6)
    assert torch.allclose(kl.encode(pixels, tiling), kl.encode(pixels), atol=1e-6)


def test_tiles_show_no_seam(taesd, noise):
    """TAESD has no norms, so a tile differs from the whole only near its cut edges, where its weight is small."""
    latent = noise(1, 4, 30, 22)
    whole, parts = taesd.decode(latent), taesd.decode(latent, Tiling(tile_size=128, overlap=64))
    assert (parts - whole).abs().mean() < 0.05 * whole.std()
    pixels = noise(1, 3, 240, 176)
    whole, parts = taesd.encode(pixels), taesd.encode(pixels, Tiling(tile_size=128, overlap=64))
    assert parts.shape == whole.shape
    assert (parts - whole).abs().mean() < 0.15 * whole.std()


def test_bad_shapes_are_named(kl, noise):
    with pytest.raises(Impossible, match="takes \\[B, 4, h, w\\]"):
        kl.check_latent(noise(1, 16, 8, 8))
    with pytest.raises(Impossible, match="multiples of 8"):
        kl.check_pixels(noise(1, 3, 65, 64))
