"""What we take of diffusers, imported without what only its pipelines and hooks need."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def _without(*packages: str) -> Iterator[None]:
    """Lets the first import of diffusers find none of these packages, unless the process has them already.

    diffusers does without transformers and torch's compiler, but would import both where they are found, which takes
    three times as long as importing diffusers itself. It looks once: where it has found them, hiding them breaks it.
    """
    hidden = [name for name in packages if name not in sys.modules and "diffusers" not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        # A decorator of diffusers' hooks, which we do not use; it imports the compiler.
        with mock.patch.object(torch.compiler, "disable", _undecorated):
            yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _undecorated(function: Callable | None = None, **_options: Any) -> Callable:
    return function or _undecorated


with _without("transformers", "torch._dynamo"):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.models.upsampling import Upsample2D
    from diffusers.utils.torch_utils import fourier_filter

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "BasicTransformerBlock",
    "Downsample2D",
    "ResnetBlock2D",
    "Transformer2DModel",
    "UNet2DConditionModel",
    "Upsample2D",
    "convert_ldm_vae_checkpoint",
    "fourier_filter",
]
