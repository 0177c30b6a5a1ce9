"""Paints the README's pictures: twelve captions, and each LoRA at strengths 0, 0.5 and 1.

python training/grid.py [--output docs/images]
"""

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.painter import LORAS, ROOT, Miniature
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
LABEL = 28  # pixels below each picture


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
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    miniature = Miniature()

    short = [caption.removesuffix(" background") for caption in CAPTIONS]
    sheet(miniature.pictures(list(CAPTIONS), seed=arguments.seed), short, 4).save(arguments.output / "miniature.png")

    rows, labels = [], []
    for path in sorted(LORAS.glob("*.safetensors")):
        for strength in STRENGTHS:
            rows += list(miniature.pictures(list(CAPTIONS[:2]), seed=arguments.seed, lora={path.stem: strength}))
            labels += [f"{path.stem} {strength:g}"] * 2
    sheet(np.stack(rows), labels, 6).save(arguments.output / "miniature_loras.png")


if __name__ == "__main__":
    main()
