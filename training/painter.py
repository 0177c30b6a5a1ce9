"""Paints with a checkpoint as a user's server loads it: the project's own engine, from the safetensors file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from handlers.engine import tokenizer
from handlers.engine.checkpoints import detect, read_header
from handlers.engine.lora_files import LoraFiles
from handlers.engine.lora_names import unet_targets
from handlers.engine.lora_overlays import Overlays
from handlers.engine.text_encoder import TextEncoder
from handlers.engine.unet import UNet
from handlers.engine.vae import VAE
from protocol.messages import LoraUse
from training import samplers
from training.shapes import SIZE

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "miniature" / "luna_miniature.safetensors"
LORAS = ROOT / "miniature" / "loras"
LATENT_SCALE = 0.18215  # a LATENT of SD1.x is what its UNet paints, divided by this
BATCH = 50
LORA_BYTES = 64 << 20


class Painter:
    """A checkpoint's three parts in float32 on the CPU, and the way from captions to pictures."""

    def __init__(self, checkpoint: Path, loras: Path = LORAS):
        """Raises `LunaError` where the file cannot be served."""
        cpu = torch.device("cpu")
        parts = detect(read_header(checkpoint)).parts
        self.text = TextEncoder.load(checkpoint, parts["clip"], "clip_l", torch.float32, cpu)
        self.unet = UNet.load(checkpoint, parts["unet"], torch.float32, cpu)
        self.vae = VAE.load(checkpoint, parts["vae"], torch.float32, cpu)
        targets = unet_targets(self.unet.names)
        weights = {name: weight.shape for name, weight in self.unet.model.named_parameters()}
        files = LoraFiles((loras,), targets, weights, capacity=LORA_BYTES)
        self.overlays = Overlays(self.unet.model, files, targets.seeds, budget=LORA_BYTES)
        self.alphas_cumprod = samplers.alphas_cumprod()

    @torch.inference_mode()
    def paint(
        self,
        captions: list[str],
        steps: int = 20,
        sampler: str = "euler",
        cfg: float = 5.0,
        seed: int = 0,
        lora: Mapping[str, float] | None = None,
    ) -> np.ndarray:
        """Pictures of the captions, float32 [len(captions), SIZE, SIZE, 3] in 0..1.

        `lora` gives LoRAs by name, each with its strength. Each caption's noise depends on its place in the list and on
        `seed` alone.
        """
        noise = torch.randn(len(captions), 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
        rows = range(0, len(captions), BATCH)
        stack = self.overlays.stack([LoraUse(name=name, strength_patch=value) for name, value in (lora or {}).items()])
        with self.overlays.merged(stack):
            batches = [self._paint(captions[i : i + BATCH], noise[i : i + BATCH], steps, sampler, cfg) for i in rows]
        return np.concatenate(batches)

    def _paint(self, captions: list[str], noise: torch.Tensor, steps: int, sampler: str, cfg: float) -> np.ndarray:
        context = torch.cat([self.encode(captions), self.encode([""]).expand(len(captions), -1, -1)])
        logs = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().log().numpy()

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            timestep = float(np.interp(sigma.log().item(), logs, np.arange(len(logs))))
            both = torch.cat([x, x]) / (sigma**2 + 1).sqrt()
            with_caption, without = self.unet.forward(both, torch.full((len(both),), timestep), context).chunk(2)
            return x - sigma * (without + cfg * (with_caption - without))

        sigmas = samplers.noise_levels(self.alphas_cumprod, steps)
        x = samplers.SAMPLERS[sampler](denoise, noise * (1 + sigmas[0] ** 2).sqrt(), sigmas)
        pixels = self.vae.decode(x / LATENT_SCALE)
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def encode(self, captions: list[str]) -> torch.Tensor:
        """What the UNet attends to, float32 [len(captions), 77, width]."""
        return self.text.encode(tokenizer.sections(captions, pad=tokenizer.END)[:, 0])[0]
