"""The miniature's autoencoder: TAESD's layout (8x smaller, 4 channels) at half its width.

What a latent means is laid down, not learned: three channels are the 8x smaller picture's colours, the fourth says on
which side of the cell's diagonal it is brighter. A flat colour is then a flat latent, which makes the UNet's task easy;
encoder and decoder learn to go there and back, and the UNet can be trained without waiting for them.
"""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from training import progress, shapes

WIDTH = 32
STEPS = 1600
BATCH = 12
CROP = 64  # pixels; the network is convolutional, and small crops cost a quarter of the picture
POOL = 2000  # pictures
RATE = 2e-3


def build() -> AutoencoderTiny:
    """An untrained autoencoder. Its decoder returns pictures in -1..1, its encoder takes them.

    The convolutions between resolutions start near the identity and each block's last one near zero: without
    normalisation a network this deep otherwise takes its first thousand steps to pass a colour through.
    """
    widths = (WIDTH,) * 4
    model = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    for name, module in model.named_modules():
        if name.endswith("conv.4"):
            module.weight.data *= 0.1
        elif isinstance(module, torch.nn.Conv2d) and module.bias is None:
            module.weight.data = torch.nn.init.dirac_(torch.empty_like(module.weight)) + 0.2 * module.weight.data
    return model


def _to_tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1


def target_latents(images: torch.Tensor) -> torch.Tensor:
    """The latents that images, float32 [n, 3, h, w] in -1..1, are to have: float32 [n, 4, h / 8, w / 8]."""
    ramp = torch.arange(8.0) - 3.5
    kernel = torch.zeros(4, 3, 8, 8)
    kernel[range(3), range(3)] = 1.25 / 64
    kernel[3] = (ramp[:, None] + ramp[None, :]) * 0.25 / 64
    return F.conv2d(images, kernel, stride=8)


def latents(pictures: np.ndarray) -> torch.Tensor:
    """The latents of drawn pictures, float32 [n, SIZE, SIZE, 3] in 0..1: what the UNet learns to paint."""
    return target_latents(_to_tensor(pictures))


def train(path: Path, seed: int = 0, steps: int = STEPS) -> AutoencoderTiny:
    """Trains or resumes the autoencoder kept at `path`. The decoder sees slightly noisy target latents, so that it
    forgives a sampler's small errors."""
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    first = progress.restore(path, {"vae": model}, optimizer)
    rng = np.random.default_rng([seed, first])
    torch.manual_seed(seed + first)
    pool = _to_tensor(np.stack([shapes.draw_any_colours(rng) for _ in range(POOL)]))
    began = time.perf_counter()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / steps)
        corners = 8 * rng.integers(0, (shapes.SIZE - CROP) // 8 + 1, (BATCH, 2))
        image = torch.stack(
            [
                pool[index, :, top : top + CROP, left : left + CROP]
                for index, (top, left) in zip(rng.integers(0, POOL, BATCH), corners, strict=True)
            ]
        )
        target = target_latents(image)
        encoded = F.mse_loss(model.encoder(image), target)
        restored = model.decoder(target + 0.05 * torch.randn_like(target))
        loss = F.l1_loss(restored, image) + F.mse_loss(restored, image) + encoded
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            progress.save(path, step + 1, {"vae": model}, optimizer)
            l1 = F.l1_loss(restored, image).item() / 2
            print(
                f"vae {step + 1}: L1 {l1:.4f}, latents {encoded.item():.4f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return model.eval().requires_grad_(False)
