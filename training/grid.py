"""Paints the README's pictures: twelve captions, and each LoRA at strengths 0, 0.5 and 1, by a server that it starts.

python training/grid.py [--output docs/images]
"""

import argparse
import os
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from luna_client.server import Server
from luna_protocol.messages import ClipText, LoraUse, UNetForward, VaeDecode
from scripts.sampling import LATENT_SCALE, SAMPLERS
from serving.archives import pack_checkpoint, pack_repository
from serving.torchserve import Ports, TorchServe
from training.painter import CHECKPOINT, LORAS, ROOT
from training.shapes import SIZE

CAPTIONS = (
    "a red circle on a blue background",
    "a large yellow star on a black background",
    "a small green triangle on a white background",
    "an orange cross on a grey background",
    "a purple ring on a yellow background",
    "a white square on the left on a green background",
    "a blue star at the top on a pink background",
    "a black ring on the right on a red background",
    "a large green circle at the bottom on a white background",
    "a red star and a blue circle on a white background",
    "a yellow square and a green triangle on a blue background",
    "a white ring and an orange cross on a black background",
)
STRENGTHS = (0.0, 0.5, 1.0)
STEPS, GUIDANCE = 20, 5.0
LABEL = 28  # pixels below each picture


def paint(server: Server, captions: list[str], seed: int, lora: list[LoraUse] = ()) -> np.ndarray:
    """Pictures of the captions by the served miniature, float32 [len(captions), SIZE, SIZE, 3] in 0..1. The n-th
    depends on its caption and seed + n alone."""
    texts = [""] * len(captions) + captions
    context = server.call(f"{CHECKPOINT.stem}.clip", ClipText(texts=texts))[1]["hidden"]
    noises = [torch.Generator().manual_seed(seed + i) for i in range(len(captions))]
    sampler = SAMPLERS["euler"]()
    sampler.set_timesteps(STEPS)
    x = randn_tensor((len(captions), 4, SIZE // 8, SIZE // 8), noises) * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        tensors = {
            "x": sampler.scale_model_input(torch.cat([x, x]), timestep),
            "timesteps": timestep.float().expand(len(texts)),
            "context": context,
        }
        out = server.call(f"{CHECKPOINT.stem}.unet", UNetForward(lora=list(lora)), tensors)[1]["out"]
        empty, prompted = out.chunk(2)
        x = sampler.step(empty + GUIDANCE * (prompted - empty), timestep, x).prev_sample
    pixels = server.call(f"{CHECKPOINT.stem}.vae", VaeDecode(), {"latent": x / LATENT_SCALE["sd15"]})[1]["pixels"]
    return ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def sheet(pictures: np.ndarray, labels: list[str], columns: int) -> Image.Image:
    """Labelled pictures, float [n, SIZE, SIZE, 3] in 0..1, in rows of `columns`."""
    width, height = SIZE + 8, SIZE + LABEL + 8
    image = Image.new("RGB", (columns * width, -(-len(labels) // columns) * height), "white")
    pen = ImageDraw.Draw(image)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = index % columns * width + 4, index // columns * height + 4
        image.paste(Image.fromarray((picture * 255).round().astype(np.uint8)), (left, top))
        pen.text((left, top + SIZE + 2), textwrap.fill(label, 24), fill="black", font_size=10)
    return image.quantize(256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ |= {"LUNA_LORAS": str(LORAS), "OMP_NUM_THREADS": "1"}
        archives = pack_checkpoint(CHECKPOINT, home / "store", home=home) + pack_repository(home / "store", home)
        with TorchServe(home / "store", home / "run", Ports.free()) as running:
            server = Server(running.inference, running.management, running.key_file)
            models = [archive.model for archive in archives]
            for model in models:
                server.load(model)
            server.wait_ready(models)
            draw(server, arguments.output, arguments.seed)


def draw(server: Server, output: Path, seed: int) -> None:
    short = [caption.removesuffix(" background") for caption in CAPTIONS]
    sheet(paint(server, list(CAPTIONS), seed), short, 4).save(output / "miniature.png")

    rows, labels = [], []
    for path in sorted(LORAS.glob("*.safetensors")):
        for strength in STRENGTHS:
            use = LoraUse(name=path.stem, strength_patch=strength)
            rows += list(paint(server, list(CAPTIONS[:2]), seed, [use]))
            labels += [f"{path.stem} {strength:g}"] * 2
    sheet(np.stack(rows), labels, 6).save(output / "miniature_loras.png")


if __name__ == "__main__":
    main()
