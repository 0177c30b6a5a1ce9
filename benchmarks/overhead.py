"""What a picture costs more when its UNet is served: a 20-step txt2img with cond and uncond, remote against the same
UNet called in this process.

On a miniature (16 x 16 latents) and, unless --quick, on a full-width SD1.5 UNet at 512 px. Random weights in fp32, one
thread on both sides. The two samplers advance step by step in turn.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._bench import arguments, conclude, scratch_home, serving, show
from engine.checkpoints import detect, read_header
from engine.unet import UNet
from luna_protocol.blob import content_hash
from luna_protocol.messages import UNetForward
from serving.archives import pack_checkpoint
from tests import checkpoints

STEPS, GUIDANCE = 20, 6.0
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def shape_of(**unet) -> checkpoints.CheckpointShape:
    return checkpoints.CheckpointShape(checkpoints.UNetShape(**unet), checkpoints.TextShape(64, 1), checkpoints.TAESD)


MINIATURE = shape_of(context=256, channels=64, multipliers=(1, 2, 4), depths=(1, 1, 1), res_blocks=2)
SD15 = shape_of(context=768, multipliers=(1, 2, 4, 4), depths=(1, 1, 1, 0), res_blocks=2)


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    with scratch_home() as home:
        ratios = {"miniature_ratio": compare(home, "miniature", MINIATURE, 16, pictures=3 if options.quick else 10)}
        ratios["full_width_ratio"] = None if options.quick else compare(home, "SD1.5", SD15, 64, pictures=1)
    conclude(ratios)


@torch.inference_mode()
def compare(home: Path, name: str, shape: checkpoints.CheckpointShape, side: int, pictures: int) -> float:
    file = checkpoints.write(home / "models" / "checkpoints" / f"{name}.safetensors", shape)
    [model] = [
        each.model for each in pack_checkpoint(file, home / "model_store", "it", "fp32", home) if "unet" in each.model
    ]
    unet = UNet.load(file, detect(read_header(file)).parts["unet"], torch.float32, torch.device("cpu"))
    context = torch.randn(2, 77, unet.layout.context_dim)
    request = UNetForward(references={"context": content_hash(context)})
    seconds: dict[str, list[float]] = {"in this process": [], "served": []}
    with serving(home, [model]) as (_, server):

        def remote(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
            return server.call(model, request, {"x": x, "timesteps": timesteps, "context": context})[1]["out"]

        for forward in (unet.forward, remote):
            next(sampler(forward, context, side))
        for _ in range(pictures):
            ways = dict(zip(seconds, (sampler(f, context, side) for f in (unet.forward, remote)), strict=True))
            for _ in range(STEPS):
                latents = []
                for way, steps in ways.items():
                    begun = time.perf_counter()
                    latents.append(next(steps))
                    seconds[way].append(time.perf_counter() - begun)
                assert torch.equal(*latents)
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    rows = [[way, median * 1e3, median * STEPS] for way, median in medians.items()]
    added = (medians["served"] - medians["in this process"]) * 1e3
    show(
        f"{name}, {side * 8} px, {sum(p.numel() for p in unet.model.parameters()) / 1e6:.0f} M parameters, "
        f"{pictures} x {STEPS} steps: {added:.1f} ms a step added",
        ["", "a step, ms (median)", f"{STEPS} steps, s"],
        rows,
    )
    return medians["served"] / medians["in this process"]


def sampler(forward: Forward, context: Tensor, side: int) -> Iterator[Tensor]:
    """The latent [1, 4, side, side] after each step of Euler's method (Karras et al. 2022, arXiv:2206.00364)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    timesteps = torch.linspace(999, 0, STEPS).round()
    sigmas = torch.cat([((1 - alphas) / alphas).sqrt()[timesteps.long()], torch.zeros(1)]).float()
    x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1)) * (1 + sigmas[0] ** 2).sqrt()
    for step in range(STEPS):
        scaled = (x / (1 + sigmas[step] ** 2).sqrt()).repeat(2, 1, 1, 1)
        cond, uncond = forward(scaled, timesteps[step].float().repeat(2), context).chunk(2)
        x = x + (uncond + GUIDANCE * (cond - uncond)) * (sigmas[step + 1] - sigmas[step])
        yield x


if __name__ == "__main__":
    main()
