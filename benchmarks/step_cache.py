"""What step caching is worth: speed against likeness to the uncached picture, per sampler, policy and setting, with
fewer steps at the same cost beside each. In one process, against the engine: no server, no wire."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from benchmarks._bench import conclude, in_turns, show
from engine import step_cache
from engine.step_cache import StepCache, rows_of
from engine.step_policies import policy
from engine.step_presets import ANY, Presets, Setting
from engine.unet import UNet
from engine.unet_layout import UNetLayout
from scripts.cache_quality import Comparison, compare
from scripts.sampling import SAMPLERS, Painter
from training.evaluate import held_out
from training.measure import look
from training.shapes import SIZE, Scene

ROOT = Path(__file__).resolve().parents[1]
QUICK_SAMPLERS = ("euler", "dpmpp_2m")
CFG = 5.0
FASTEST_FIRST = ("fast", "balanced", "quality")
SETTINGS = [
    *(Setting(policy="first_block", parameters={"residual_threshold": t}) for t in (0.05, 0.1, 0.2)),
    *(Setting(policy="deep_cache", parameters={"interval": i}, end_timestep=100) for i in (2, 3)),
    *(Setting(policy="forecast", parameters={"interval": i}, end_timestep=50) for i in (2, 3)),
    *(Setting(policy="forecast", parameters={"interval": i}, start_timestep=750, end_timestep=50) for i in (3, 4)),
]
SD15 = UNetLayout(
    in_channels=4,
    out_channels=4,
    channels=(320, 640, 1280, 1280),
    input_depths=((1, 1), (1, 1), (1, 1), (0, 0)),
    middle_depth=1,
    output_depths=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    context_dim=768,
    use_linear=False,
    adm_channels=None,
)


def right(pictures: torch.Tensor, scenes: list[Scene]) -> float:
    """The share of pictures whose shape, colour and background are all as their caption says."""
    wanted = [(scene.things[0].shape, scene.things[0].colour, scene.background) for scene in scenes]
    seen = [look(picture) for picture in pictures.permute(0, 2, 3, 1).numpy()]
    return float(np.mean([one == other for one, other in zip(seen, wanted, strict=True)]))


def label(setting: Setting, presets: dict[str, Setting]) -> str:
    values = " ".join(f"{name} {value:g}" for name, value in setting.parameters.items())
    window = [setting.start_timestep, setting.end_timestep]
    inside = "" if window == [None, None] else f" t {window[0] or 1000:g}..{window[1] or 0:g}"
    names = [name for name, preset in presets.items() if preset.resolved() == setting.resolved()]
    return f"{setting.policy} {values}{inside}" + (f" = {', '.join(names)}" if names else "")


def qualities(
    painter: Painter, sampler: str, steps: int, scenes: list[Scene], presets: dict[str, Setting], quick: bool
):
    """Prints the table of one sampler and number of steps; returns its comparisons."""
    settings = [] if quick else list(SETTINGS)
    for setting in presets.values():
        if all(setting.resolved() != other.resolved() for other in settings):
            settings.append(setting)
    captions = [scene.caption for scene in scenes]
    references, found = compare(painter, captions, sampler, steps, settings, side=SIZE, cfg=CFG)
    rows = [["uncached", 0.0, 1.0, "", "", "", f"{right(references, scenes):.0%}", "", ""]]
    for one in found:
        psnr, fewer = one.psnr, one.fewer
        rows.append(
            [
                label(one.setting, presets),
                f"{one.skipped:.0%}",
                f"{one.speedup:.2f}",
                f"{psnr.mean():.1f}",
                f"{psnr.min():.1f}",
                f"{one.ssim.mean():.3f}",
                f"{right(one.pictures, scenes):.0%}",
                f"{fewer.steps}: {fewer.psnr.mean():.1f} / {fewer.psnr.min():.1f} {right(fewer.pictures, scenes):.0%}",
                "yes" if one.beats_fewer_steps else "no",
            ]
        )
    columns = [
        "setting",
        "skipped",
        "speedup",
        "PSNR",
        "min",
        "SSIM",
        "right",
        "fewer steps at that cost",
        "beats them",
    ]
    show(f"{sampler}, {steps} steps, {len(scenes)} captions", columns, rows)
    return found


def draw(found: dict[tuple[str, int], list[Comparison]], path: Path) -> None:
    """Speed against mean PSNR, one line per policy and one for fewer steps, one panel per sampler, at most steps."""
    import matplotlib.pyplot as plt

    steps = max(count for _, count in found)
    samplers = [sampler for sampler, count in found if count == steps]
    figure, axes = plt.subplots(2, (len(samplers) + 1) // 2, figsize=(11, 6), sharex=True, squeeze=False)
    for axis, sampler in zip(axes.flat, samplers, strict=False):
        comparisons = found[sampler, steps]
        lines = {name: [c for c in comparisons if c.setting.policy == name] for name in _policies(comparisons)}
        lines["fewer steps"] = [c.fewer for c in comparisons if c.fewer.steps < steps]
        for name, points in lines.items():
            points = sorted({(c.speedup, c.psnr.mean().item()) for c in points})
            style = {"color": "black", "linestyle": "--"} if name == "fewer steps" else {}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        axis.set_title(f"{sampler}, {steps} steps", fontsize=9)
        axis.set_ylim(10, 70)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("speedup")
    figure.supylabel("mean PSNR to the uncached picture, dB")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _policies(comparisons: list[Comparison]) -> list[str]:
    return list(dict.fromkeys(comparison.setting.policy for comparison in comparisons))


@contextmanager
def timed_bookkeeping() -> Iterator[list[float]]:
    """Collects the seconds of all that a step cache does beside running blocks."""
    spent: list[float] = []
    places = [(step_cache._Detours, "after_input"), (step_cache._Detours, "before_output"), (StepCache, "_put")]
    originals = [getattr(owner, name) for owner, name in places]

    def timed(original):
        def call(*arguments):
            begun = time.perf_counter()
            result = original(*arguments)
            spent.append(time.perf_counter() - begun)
            return result

        return call

    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, timed(original))
    try:
        yield spent
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


@torch.inference_mode()
def full_width(side: int, repeats: int) -> dict[str, float]:
    """A full-width SD1.5 UNet of random weights, cond and uncond at side x side pixels: a hit's share of a full forward
    per policy, and what deciding costs on a miss."""
    model = UNet2DConditionModel(**SD15.diffusers_config()).eval().requires_grad_(False)
    unet = UNet(model, SD15, {})
    x, context = torch.randn(2, 4, side // 8, side // 8), torch.randn(2, 77, 768)
    full = {"full": lambda: unet.forward(x, torch.full((2,), 999.0), context)}
    settings = {"first_block": {"residual_threshold": 10}, "forecast": {"interval": 100}}
    settings |= {f"deep_cache, branch {b}": {"interval": 100, "branch": b} for b in (1, 2, 3)}
    for name, parameters in settings.items():
        full[name] = _endless_hits(unet, x, context, policy(name.split(",")[0], parameters))
    seconds = {name: statistics.median(times) for name, times in in_turns(full, 1, repeats, warm_up=1).items()}
    shares = {name: seconds[name] / seconds["full"] for name in settings}
    never = policy("first_block", {"residual_threshold": 1e-9})
    cache = StepCache(unet, 8 << 30, 3600)
    cache.forward(x, torch.full((2,), 999.0), context, rows=_rows(0, never))
    with timed_bookkeeping() as spent:
        cache.forward(x + 0.01, torch.full((2,), 998.0), context, rows=_rows(1, never))
    shares["deciding on a miss"] = sum(spent) / seconds["full"]
    rows = [[name, f"{share:.2%}"] for name, share in shares.items()]
    show(f"Full-width SD1.5 UNet, {side} x {side} pixels, full forward {seconds['full']:.2f} s", ["", "share"], rows)
    return shares


def _rows(step: int, chosen):
    return rows_of("run", step, ["uncond", "cond"], chosen, (float("inf"), float("-inf")))


def _endless_hits(unet: UNet, x: torch.Tensor, context: torch.Tensor, chosen):
    """A call that is a hit every time, after the full evaluations it needs."""
    cache, count = StepCache(unet, 8 << 30, 3600), iter(range(10_000))

    def call():
        step = next(count)
        _, outcomes = cache.forward(x, torch.full((2,), 999.0 - step), context, rows=_rows(step, chosen))
        return outcomes

    while not call()[0].hit:
        pass
    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="presets of two samplers, 30 steps, 4 captions")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "miniature" / "luna_miniature.safetensors")
    parser.add_argument("--captions", type=int, default=16, help="held-out captions (default: %(default)s)")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), metavar="NAME")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 30])
    parser.add_argument("--figure", type=Path, help="draw speed against quality there (needs matplotlib)")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    painter = Painter(arguments.checkpoint, torch.device("cpu"))
    presets = Presets.load(arguments.checkpoint).samplers
    scenes = held_out(4 if arguments.quick else arguments.captions)
    found: dict[tuple[str, int], list[Comparison]] = {}
    for sampler in QUICK_SAMPLERS if arguments.quick else arguments.samplers:
        for steps in [30] if arguments.quick else arguments.steps:
            own = presets.get(sampler, presets.get(ANY, {}))
            found[sampler, steps] = qualities(painter, sampler, steps, scenes, own, arguments.quick)
    result = {"sampler": {s: _summary(found[s, n], presets.get(s, {})) for s, n in found if n == max(arguments.steps)}}
    if not arguments.quick:
        result["full_width"] = full_width(256, 3)
    if arguments.figure:
        draw(found, arguments.figure)
    conclude(result)
    return 0


def _summary(comparisons: list[Comparison], presets: dict[str, Setting]) -> dict | None:
    """The fastest preset of a sampler, None where it has none."""
    for name in FASTEST_FIRST:
        if name in presets:
            one = next(c for c in comparisons if c.setting.resolved() == presets[name].resolved())
            figures = {key: one.figures[key] for key in ("speedup", "psnr_mean", "psnr_min")}
            return {"preset": name, **figures, "fewer_steps_psnr": one.fewer.psnr.mean().item()}
    return None


if __name__ == "__main__":
    sys.exit(main())
