"""The miniature's UNet, trained to predict the noise in latents of freshly drawn scenes."""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextModel

from engine.unet_layout import UNetLayout
from training import progress, shapes, text
from training.autoencoder import latents

STEPS = 5000
BATCH = 16
RATE = 6e-4
DROPPED = 0.1  # share of captions left empty, so that classifier-free guidance works
SAVE_EVERY = 100
SCHEDULE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # SD1.x's
# Three levels with attention in each, one residual block per level down and two up.
LAYOUT = UNetLayout(
    in_channels=4,
    out_channels=4,
    channels=(64, 64, 128),
    input_depths=((1,), (1,), (1,)),
    middle_depth=1,
    output_depths=((1, 1), (1, 1), (1, 1)),
    context_dim=text.WIDTH,
    use_linear=False,
    adm_channels=None,
)


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet of `LAYOUT`."""
    return UNet2DConditionModel(**LAYOUT.diffusers_config())


def noise_loss(unet, context: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Weighted squared error of the predicted noise.

    A flat colour is decided at high noise, where the plain error hardly sees it. So most timesteps are drawn from the
    noisier half, and the error is weighted like the velocity's (Salimans and Ho 2022, arXiv:2202.00512), at most
    20-fold.
    """
    count = clean.shape[0]
    timestep = torch.randint(0, 1000, (count,))
    timestep[: count // 4] = torch.randint(500, 1000, (count // 4,))
    noise = torch.randn_like(clean)
    predicted = unet(SCHEDULE.add_noise(clean, noise, timestep), timestep, context).sample
    alpha = SCHEDULE.alphas_cumprod[timestep].view(-1, 1, 1, 1)
    return ((predicted - noise).pow(2) / alpha.clamp(min=0.05)).mean()


def train(path: Path, reader: CLIPTextModel, seed: int = 0, steps: int = STEPS) -> UNet2DConditionModel:
    """Trains or resumes the UNet kept at `path` on captions as `reader` reads them; returns its moving average.

    The rate is constant for 60 % of the steps and then falls linearly.
    """
    torch.manual_seed(seed)
    unet = build_unet()
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    first = progress.restore(path, {"unet": unet, "average": average}, optimizer)
    rng = np.random.default_rng([seed, first])
    torch.manual_seed(seed + first)
    began, losses = time.perf_counter(), []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100, max(0.02, (1 - step / steps) / 0.4))
        scenes = [shapes.random_scene(rng) for _ in range(BATCH)]
        clean = latents(np.stack([shapes.draw(scene) for scene in scenes]))
        captions = ["" if rng.random() < DROPPED else scene.caption for scene in scenes]
        with torch.no_grad():
            context = reader(text.tokenize(captions)).last_hidden_state
        loss = noise_loss(unet, context, clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(unet)
        losses.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            progress.save(path, step + 1, {"unet": unet, "average": average}, optimizer)
            print(f"unet {step + 1}: loss {np.mean(losses):.4f}, {time.perf_counter() - began:.0f} s", flush=True)
            losses.clear()
    return average.module.eval().requires_grad_(False)
