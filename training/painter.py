"""Paints with the miniature as a server loads it: the project's engine, LoRAs and all, from the safetensors files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from engine.lora.files import LoraFiles
from engine.lora.names import unet_targets
from engine.lora.overlays import Overlays
from luna_protocol.messages import LoraUse
from scripts.sampling import Painter
from training.shapes import SIZE

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "miniature" / "luna_miniature.safetensors"
LORAS = ROOT / "miniature" / "loras"
BATCH = 50
LORA_BYTES = 64 << 20


class Miniature(Painter):
    """A checkpoint in float32 on the CPU, and the LoRAs in the folder `loras`."""

    def __init__(self, checkpoint: Path = CHECKPOINT, loras: Path = LORAS):
        """Raises as `Painter`."""
        super().__init__(checkpoint, torch.device("cpu"))
        targets = unet_targets(self.unet.names)
        weights = {name: weight.shape for name, weight in self.unet.model.named_parameters()}
        files = LoraFiles((loras,), targets, weights, capacity=LORA_BYTES)
        self.overlays = Overlays(self.unet.model, files, budget=LORA_BYTES)

    def pictures(
        self,
        captions: list[str],
        steps: int = 20,
        sampler: str = "euler",
        cfg: float = 5.0,
        seed: int = 0,
        lora: Mapping[str, float] | None = None,
    ) -> np.ndarray:
        """Pictures of the captions, float32 [len(captions), SIZE, SIZE, 3] in 0..1.

        `lora` gives LoRAs by name, each with its strength. The n-th picture depends on its caption and seed + n alone.
        """
        stack = self.overlays.stack([LoraUse(name=name, strength_patch=value) for name, value in (lora or {}).items()])
        painted = []
        with self.overlays.merged(stack):
            for first in range(0, len(captions), BATCH):
                batch = captions[first : first + BATCH]
                [painting] = self.paint(batch, sampler, steps, side=SIZE, cfg=cfg, seed=seed + first)
                painted.append(painting.pictures)
        return torch.cat(painted).permute(0, 2, 3, 1).numpy()
