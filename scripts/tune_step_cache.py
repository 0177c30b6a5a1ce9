"""Find a checkpoint's step cache presets: per sampler the fastest setting that keeps a quality floor and beats fewer
steps. Writes them beside the checkpoint, where served models read them when they load.

    python scripts/tune_step_cache.py MODEL [--prompts FILE] [--side PIXELS]
"""

import _environment

_environment.ensure()

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from engine.roots import Roots, find
from engine.step_presets import ANY, Presets, Setting
from luna_protocol.errors import LunaError
from scripts.cache_quality import Comparison, compare
from scripts.sampling import SAMPLERS, Painter

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "a portrait of an old fisherman, overcast light",
    "a city street at night in the rain, neon signs",
    "a bowl of oranges on a wooden table, oil painting",
    "a mountain lake at sunrise, wide angle",
)
SIDES = {"sd15": 512, "sdxl": 1024}
# Decibels and similarity against the uncached picture, mean and worst over the prompts.
FLOORS = {
    "quality": {"psnr_mean": 40.0, "psnr_min": 35.0, "ssim_mean": 0.98},
    "balanced": {"psnr_mean": 35.0, "psnr_min": 30.0, "ssim_mean": 0.95},
    "fast": {"psnr_mean": 30.0, "psnr_min": 25.0, "ssim_mean": 0.90},
}


def candidates() -> list[Setting]:
    """What is tried: the last timesteps, where details settle, are always computed in full."""
    first_block = [
        Setting(policy="first_block", parameters={"residual_threshold": threshold}, end_timestep=100)
        for threshold in (0.05, 0.1, 0.15, 0.2, 0.3)
    ]
    reaches = [{"interval": 4, "reach": reach} for reach in (35, 70, 105)]  # one, two and three of 30 steps
    deep_cache = [Setting(policy="deep_cache", parameters=reach, end_timestep=100) for reach in reaches]
    windows = ((None, 50), (850, 50), (750, 50), (600, 150))
    forecast = [
        Setting(policy="forecast", parameters=reach, start_timestep=start, end_timestep=end)
        for reach, (start, end) in product(reaches, windows)
    ]
    return first_block + deep_cache + forecast


def choose(found: list[list[Comparison]]) -> dict[str, Setting]:
    """{preset: the setting fastest on average that keeps its floor in all lists, and beats fewer steps wherever it
    reuses anything}. The lists compare the same settings under different samplers or numbers of steps."""
    chosen: dict[str, Setting] = {}
    for preset, floor in FLOORS.items():
        worthy = [
            alike
            for alike in zip(*found, strict=True)
            if any(one.skipped for one in alike)
            and all(one.beats_fewer_steps or not one.skipped for one in alike)
            and all(one.figures[k] >= floor[k] for one in alike for k in floor)
        ]
        if worthy:
            best = max(worthy, key=_speedup)
            figures = {name: min(one.figures[name] for one in best) for name in best[0].figures}
            figures["fewer_steps_psnr_mean"] = min(one.fewer.psnr.mean().item() for one in best)
            measured = {name: float(f"{value:.4g}") for name, value in (figures | {"speedup": _speedup(best)}).items()}
            chosen[preset] = best[0].setting.model_copy(update={"measured": measured})
    return chosen


def _speedup(alike: Sequence[Comparison]) -> float:
    return fmean(one.speedup for one in alike)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a whole checkpoint: its name under a checkpoint root, or its path")
    parser.add_argument("--prompts", type=Path, help="a text file with one prompt a line (default: four scenes)")
    parser.add_argument("--side", type=int, help="pixels along each side (default: 512 for SD1.5, 1024 for SDXL)")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), metavar="NAME")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[20, 30], help="a preset must keep its promise at each (default: 20 30)"
    )
    parser.add_argument("--cfg", type=float, default=6.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        path = Path(arguments.model)
        checkpoint = path if path.is_file() else find(Roots.from_environment(ROOT).checkpoints, path.name, "checkpoint")
        painter = Painter(checkpoint, torch.device(arguments.device))
    except (LunaError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    prompts = list(PROMPTS)
    if arguments.prompts:
        lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    how = {"side": arguments.side or SIDES[painter.family], "cfg": arguments.cfg}
    settings, found = candidates(), {}
    for sampler in arguments.samplers:
        found[sampler] = [compare(painter, prompts, sampler, steps, settings, **how)[1] for steps in arguments.steps]
        for preset, setting in choose(found[sampler]).items():
            print(f"{sampler}: {preset}: {setting.model_dump(exclude_none=True)}", flush=True)
    samplers = {sampler: choose(comparisons) for sampler, comparisons in found.items()}
    samplers[ANY] = choose([comparison for comparisons in found.values() for comparison in comparisons])
    presets = Presets(floors=FLOORS, samplers=samplers)
    Presets.path(checkpoint).write_text(presets.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")
    print(f"{Presets.path(checkpoint)}: load the model again to have it read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
