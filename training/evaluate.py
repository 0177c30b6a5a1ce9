"""Measures what the miniature paints for captions it was never trained on.

    python training/evaluate.py [--captions 200] [--checkpoint FILE]

Prints a table of the shares of pictures with the right shape, colour and background, for 10, 20 and 30 steps of Euler
and DPM++ 2M, and then one JSON line, whose shares are Euler's.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.measure import look
from training.painter import CHECKPOINT, Miniature
from training.shapes import Scene, random_scene

SAMPLERS = ("euler", "dpmpp_2m")
STEPS = (10, 20, 30)
QUALITIES = ("shape", "colour", "background")


def held_out(count: int, seed: int = 2026) -> list[Scene]:
    """Scenes of one thing whose combination of shape, colour and background training never sees."""
    rng = np.random.default_rng(seed)
    return [random_scene(rng, held_out=True, pairs=0) for _ in range(count)]


def shares(miniature: Miniature, scenes: list[Scene], steps: int, sampler: str, cfg: float = 5.0) -> dict[str, float]:
    """The share of right shapes, colours and backgrounds among the scenes' painted captions."""
    pictures = miniature.pictures([scene.caption for scene in scenes], steps, sampler, cfg)
    wanted = [(scene.things[0].shape, scene.things[0].colour, scene.background) for scene in scenes]
    right = np.array([look(picture) for picture in pictures]) == np.array(wanted)
    return dict(zip(QUALITIES, right.mean(axis=0).round(4).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=200, help="how many to paint (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="default: %(default)s")
    parser.add_argument("--cfg", type=float, default=5.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="cores to use (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    miniature, scenes = Miniature(arguments.checkpoint), held_out(arguments.captions)
    print(f"{len(scenes)} held-out captions, CFG {arguments.cfg:g}\n")
    print(f"{'sampler':<10}{'steps':>6}" + "".join(f"{quality:>12}" for quality in QUALITIES) + f"{'ms/picture':>12}")
    found = {}
    for sampler in SAMPLERS:
        for steps in STEPS:
            began = time.perf_counter()
            found[sampler, steps] = shares(miniature, scenes, steps, sampler, arguments.cfg)
            spent = 1000 * (time.perf_counter() - began) / len(scenes)
            row = "".join(f"{found[sampler, steps][quality]:>12.1%}" for quality in QUALITIES)
            print(f"{sampler:<10}{steps:>6}{row}{spent:>12.0f}", flush=True)
    result = {
        "captions": len(scenes),
        "steps": {str(steps): found["euler", steps] for steps in STEPS},
        "size_mb": round(arguments.checkpoint.stat().st_size / 1e6, 2),
    }
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    main()
