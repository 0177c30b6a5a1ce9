"""Latents to pictures, one at a time, and in tiles where a picture is large."""

import logging

import torch
from torch import Tensor

from engine.vae import SCALE, VAE
from luna_protocol.messages import Tiling

log = logging.getLogger(__name__)

# Large enough that seams are rare, small enough for 4 GB of memory in fp16.
TILES = Tiling(tile_size=1024, overlap=128)


def decode_picture(vae: VAE, latent: Tensor, whole_pixels: int) -> Tensor:
    """Image [1, H, W, 3] float32 in 0..1 on the CPU, as ComfyUI's VAE Decode gives it, of latent [1, C, h, w].

    A picture of more than `whole_pixels` is decoded in tiles, and so is one for which the device has no memory.

    Raises:
        OutOfMemoryError: nor has it for tiles.
    """
    latent = latent.to(vae.device, vae.dtype)
    pixels = latent.shape[2] * latent.shape[3] * SCALE * SCALE
    decoded = _whole(vae, latent) if pixels <= whole_pixels else None
    if decoded is None:
        decoded = vae.decode(latent, TILES)
    return ((decoded.float().cpu() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)


def _whole(vae: VAE, latent: Tensor) -> Tensor | None:
    """The latent decoded at once; None where the device has no memory for that."""
    try:
        return vae.decode(latent)
    except torch.OutOfMemoryError:
        log.warning("no memory for %s at once: decoding in tiles", tuple(latent.shape))
    # Here the error is gone, and with it what it held of the decode.
    torch.cuda.empty_cache()
    return None
