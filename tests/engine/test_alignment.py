"""The bits of a forward do not depend on where a checkpoint's tensors begin in its file.

That every parameter lies as torch's own allocations do is asserted for itself: only some processors' matrix products
round otherwise where memory begins elsewhere, and there only those of one to three rows.
"""

from dataclasses import replace

import pytest
import torch

from engine.checkpoints import detect, read_header
from engine.text_encoder import TextEncoder
from engine.unet import UNet
from engine.vae import VAE
from tests import checkpoints
from tests.engine.conftest import CPU

OFFSETS = [0, 8, 24, 40, 56]
_SD15, _SDXL = checkpoints.SHAPES["tiny_sd15"], checkpoints.SHAPES["tiny_sdxl"]
SHAPES = {
    "sd15": replace(_SD15, unet=replace(_SD15.unet, multipliers=(1, 2), depths=(1, 0)), vae=checkpoints.TAESD),
    "sdxl": replace(_SDXL, unet=replace(_SDXL.unet, multipliers=(1, 2), depths=(0, 1), middle_depth=1, res_blocks=1)),
}


@pytest.fixture(scope="module", params=SHAPES)
def files(request, tmp_path_factory):
    """(shape, [(path, parts)]): the same checkpoint with its data at each of OFFSETS modulo 64."""
    folder = tmp_path_factory.mktemp("shifted")
    written = checkpoints.write(folder / "written.safetensors", SHAPES[request.param])
    paths = [checkpoints.shifted(written, offset, folder / f"{offset}.safetensors") for offset in OFFSETS]
    return SHAPES[request.param], [(path, detect(read_header(path)).parts) for path in paths]


def assert_same_bits(models, forward):
    """Every parameter is aligned, and `forward` gives for one row and for two what it gives with the first model."""
    expected = None
    for model in models:
        assert [p.data_ptr() % 64 for p in model.model.parameters()] == [0] * len(list(model.model.parameters()))
        outputs = [forward(model, rows) for rows in (1, 2)]
        expected = expected or outputs
        assert all(map(torch.equal, outputs, expected))


def test_unet(files, noise):
    shape, paths = files
    x, context = noise(2, 4, 4, 4), noise(2, 77, shape.unet.context)
    y = noise(2, shape.unet.y_features) if shape.unet.y_features else None

    def forward(unet, rows):
        return unet.forward(x[:rows], torch.full((rows,), 500.0), context[:rows], None if y is None else y[:rows])

    assert_same_bits((UNet.load(path, parts["unet"], torch.float32, CPU) for path, parts in paths), forward)


def test_text_encoders(files):
    shape, paths = files
    for encoder in ("clip_l", "clip_g") if shape.clip_g else ("clip_l",):
        assert_same_bits(
            (TextEncoder.load(path, parts["clip"], encoder, torch.float32, CPU) for path, parts in paths),
            lambda text, rows: torch.cat([part.flatten() for part in text.encode(torch.arange(3).repeat(rows, 1))]),
        )


def test_vae(files, noise):
    latent, pixels = noise(2, 4, 3, 3), noise(2, 3, 24, 16)
    assert_same_bits(
        (VAE.load(path, parts["vae"], torch.float32, CPU) for path, parts in files[1]),
        lambda vae, rows: torch.cat([vae.decode(latent[:rows]).flatten(), vae.encode(pixels[:rows]).flatten()]),
    )
