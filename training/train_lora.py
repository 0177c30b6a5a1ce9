"""Trains the miniature's LoRAs: low-rank changes of the frozen UNet, on pictures drawn in another style.

    python training/train_lora.py [NAME ...]

Without a name all are trained, some minutes each on one core. LoRA: Hu et al. 2021 (arXiv:2106.09685), saved under
kohya's names; LoHa: Hyeon-Woo et al. 2022 (FedPara, arXiv:2108.06098), saved under the names LyCORIS adds to them.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.sampling import Painter
from training import shapes, text
from training.autoencoder import latents
from training.diffusion import DROPPED, noise_loss
from training.painter import CHECKPOINT, LORAS

BATCH = 8


@dataclass(frozen=True)
class Recipe:
    """What a LoRA learns and how: `style` as `shapes.paint` draws it; with `convolutions` every layer is changed, else
    the transformers' alone."""

    style: str
    kind: str
    rank: int
    convolutions: bool
    steps: int = 200
    rate: float = 2e-3


RECIPES = {
    "outline_only": Recipe("outline", "lora", rank=6, convolutions=True),
    "pastel_palette": Recipe("pastel", "lora", rank=8, convolutions=False),
    "striped_fill": Recipe("stripes", "lora", rank=6, convolutions=True),
    "golden_frame": Recipe("frame", "loha", rank=3, convolutions=True),
}


class LowRank(nn.Module):
    """A weight plus a product of two thin matrices; alpha equals the rank, so the product counts as it is."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        out, inside, *kernel = weight.shape
        self.lora_down = nn.Parameter(torch.empty(rank, inside, *kernel))
        self.lora_up = nn.Parameter(torch.zeros(out, rank, *(1 for _ in kernel)))
        nn.init.kaiming_uniform_(self.lora_down, a=5**0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.lora_up.flatten(1) @ self.lora_down.flatten(1)).view_as(weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        rank = len(self.lora_down)
        return {
            "lora_down.weight": self.lora_down,
            "lora_up.weight": self.lora_up,
            "alpha": torch.tensor(float(rank)),
        }


class Hadamard(nn.Module):
    """A weight plus the elementwise product of two low-rank matrices; alpha equals the rank."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        out, inside = weight.flatten(1).shape
        self.hada_w1_a = nn.Parameter(0.1 * torch.randn(out, rank))
        self.hada_w1_b = nn.Parameter(torch.randn(rank, inside))
        self.hada_w2_a = nn.Parameter(torch.zeros(out, rank))
        self.hada_w2_b = nn.Parameter(torch.randn(rank, inside))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        change = (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
        return weight + change.view_as(weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.named_parameters()) | {"alpha": torch.tensor(float(self.hada_w1_a.shape[1]))}


KINDS = {"lora": LowRank, "loha": Hadamard}


def adapt(unet: UNet2DConditionModel, recipe: Recipe) -> dict[str, nn.Module]:
    """Puts a trainable change on each weight the recipe names: {name in the file: change}."""
    make = KINDS[recipe.kind]
    changes = {}
    for name, module in list(unet.named_modules()):
        ends = name in ("conv_in", "conv_out") or name.startswith("time_embedding")
        if isinstance(module, nn.Linear | nn.Conv2d) and not ends and (recipe.convolutions or ".attentions." in name):
            change = make(module.weight, recipe.rank)
            parametrize.register_parametrization(module, "weight", change)
            changes["lora_unet_" + name.replace(".", "_")] = change
    return changes


def train(recipe: Recipe, checkpoint: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Trains one LoRA on a checkpoint; returns the tensors of its file, fp16."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, list(shapes.STYLES).index(recipe.style)])
    painter = Painter(checkpoint, torch.device("cpu"))
    unet, reader = painter.unet.model, painter.encoders["clip_l"]
    changes = adapt(unet, recipe)
    parameters = [parameter for change in changes.values() for parameter in change.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=recipe.rate, betas=(0.9, 0.99))
    began, losses = time.perf_counter(), []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1, (step + 1) / 20) * (1 - step / recipe.steps)
        scenes = [shapes.random_scene(rng) for _ in range(BATCH)]
        clean = latents(np.stack([shapes.draw(scene, recipe.style) for scene in scenes]))
        captions = ["" if rng.random() < DROPPED else scene.caption for scene in scenes]
        with torch.no_grad():
            context, _ = reader.encode(text.tokenize(captions))
        loss = noise_loss(unet, context, clean)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            spent = time.perf_counter() - began
            print(f"{recipe.style} {step + 1}: loss {np.mean(losses[-50:]):.4f}, {spent:.0f} s", flush=True)
    return {
        f"{name}.{key}": tensor.detach().half().contiguous()
        for name, change in changes.items()
        for key, tensor in change.tensors().items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the frozen base (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=LORAS, help="folder for the files (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="cores to use (default: %(default)s)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(RECIPES)
    if unknown:
        parser.error(f"no recipe for {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or RECIPES:
        path = arguments.output / f"{name}.safetensors"
        save_file(train(RECIPES[name], arguments.checkpoint), path)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
