"""How cost grows: with sampling sessions on one server (to 64), LoRA stacks in turn (to 32), queued jobs (to 10,000)
and the latents' size (to 4096 px, the way to the UNet alone: attention itself grows faster, wherever it runs).

Each is fitted with cost = constant * n ** exponent, cost being that of n sessions' steps, of n stacks' forwards, of
taking n jobs in and handing them out, and of sending n pixels. At most 1 is what is wanted: nothing above linear.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks._bench import arguments, conclude, pack_unet, scratch_home, serving, show
from benchmarks.transport import ALONE, COMMON, HERE, step, step_tensors
from engine.checkpoints import detect, read_header
from engine.lora.files import LoraFiles
from engine.lora.names import unet_targets
from engine.lora.overlays import Overlays
from engine.saving.decode_queue import DecodeQueue
from engine.saving.job_store import Limits
from engine.unet import UNet
from luna_protocol.messages import LoraUse, StepCache, UNetForward
from luna_protocol.save_job import PictureGroup, SaveJob
from serving.archives import pack_checkpoint
from tests import checkpoints

Costs = dict[int, float]


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    repeats = 3 if options.quick else 10
    with scratch_home() as home:
        file = checkpoints.write(home / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
        models = [archive.model for archive in pack_checkpoint(file, home / "model_store", "tiny", "fp32", home)]
        unet = next(model for model in models if model.endswith(".unet"))
        handler = {"role": "unet", "home": str(home), "dtype": "fp16", "checkpoint": file.name}
        config = COMMON | ALONE | {"handler": handler}
        instant = pack_unet(home, "instant.unet", HERE / "instant_unet.py", config)
        with serving(home, [unet, instant]) as (_, server):
            costs = {
                "clients": sessions(server, unet, repeats),
                "pixels": pixels(server, instant, repeats * 5),
            }
        costs["stacks"] = stacks(file, home / "loras", repeats)
        costs["queue"] = queue(home, (100, 1000) if options.quick else (100, 1000, 10_000))
    exponents = {name: exponent(costs[name]) for name in ("clients", "stacks", "queue", "pixels")}
    for name, measured in costs.items():
        rows = [[n, cost * 1e3, cost / n * 1e3] for n, cost in measured.items()]
        show(f"{name}: exponent {exponents[name]:.2f}", [name, "cost, ms", "each, ms"], rows)
    conclude({"exponent": exponents})


def exponent(costs: Costs) -> float:
    """The slope of the least-squares line through the logarithms."""
    xs, ys = zip(*((math.log(n), math.log(cost)) for n, cost in costs.items()), strict=True)
    return statistics.linear_regression(xs, ys).slope


def best_of(repeats: int, call: Callable[[], object]) -> float:
    """Seconds at best: what else the machine does would look like growth."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def sessions(server, model: str, repeats: int) -> Costs:
    """A step of each of n sampling sessions with a step cache, all sent at once."""
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 64)
    numbers = itertools.count()

    def one(session: str, number: int) -> None:
        cache = StepCache(session=session, step=number, conds=["cond", "uncond"])
        timesteps = torch.full((2,), 999.0 - number)
        server.call(model, UNetForward(step_cache=cache), {"x": x, "timesteps": timesteps, "context": context})

    costs = {}
    for count in (1, 4, 16, 64):
        with ThreadPoolExecutor(count) as pool:

            def everyone(count=count, pool=pool) -> None:
                number = next(numbers)
                list(pool.map(lambda index: one(f"{count}-{index}", number), range(count)))

            everyone()
            costs[count] = best_of(repeats, everyone)
    return costs


def pixels(server, model: str, repeats: int) -> Costs:
    """A step of an SDXL UNet that returns at once, cond and uncond, at 512 to 4096 pixels a side."""
    costs = {}
    for side in (512, 1024, 2048, 4096):
        call = step(server, model, step_tensors() | {"x": torch.randn(2, 4, side // 8, side // 8).half()})
        for _ in range(5):
            call()
        costs[side * side] = best_of(repeats, call)
    return costs


@torch.inference_mode()
def stacks(file: Path, folder: Path, repeats: int) -> Costs:
    """A forward of each of n stacks that have been merged before, in turn."""
    checkpoints.write_lora(folder / "lora.safetensors", "tiny_sd15")
    unet = UNet.load(file, detect(read_header(file)).parts["unet"], torch.float32, torch.device("cpu"))
    targets = unet_targets(unet.names)
    shapes = {name: parameter.shape for name, parameter in unet.model.named_parameters()}
    overlays = Overlays(unet.model, LoraFiles((folder,), targets, shapes, 1 << 40), 1 << 40)
    inputs = torch.randn(2, 4, 16, 16), torch.full((2,), 500.0), torch.randn(2, 77, 64)
    every = [overlays.stack([LoraUse(name="lora", strength_patch=1 + n / 100)]) for n in range(32)]

    def in_turn(count: int) -> None:
        for stack in every[:count]:
            with overlays.merged(stack):
                unet.forward(*inputs)

    costs = {}
    for count in (1, 4, 16, 32):
        in_turn(count)
        costs[count] = best_of(repeats, lambda count=count: in_turn(count))
    return costs


def queue(home: Path, depths: tuple[int, ...]) -> Costs:
    """Taking in and handing out n jobs, by what one of them costs when n wait."""
    decode_queue = DecodeQueue(home / "spool", home / "output", Limits(jobs=1 << 20, bytes=1 << 40))
    latent = torch.randn(1, 4, 8, 8)
    numbers = itertools.count()

    def submit() -> None:
        number = next(numbers)
        group = PictureGroup(source="latent", tensor="latent", affix="", format="png", subdir=False)
        job = SaveJob(job_id=f"scale-{number:08d}", groups=[group], created=time.time())
        decode_queue.submit(job, {"latent": latent}, "m")

    costs, submitted = {}, 0
    for depth in depths:
        for _ in range(depth - submitted):
            submit()
        submitted = depth + 20
        each = best_of(20, submit) + best_of(20, lambda: decode_queue.store.claim("scale", "m"))
        costs[depth] = depth * each
    decode_queue.close()
    return costs


if __name__ == "__main__":
    main()
