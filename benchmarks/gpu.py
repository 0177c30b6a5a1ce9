"""What serving costs on a GPU, without Java: SD1.5 at 512 px and SDXL at 1024 px, random weights, fp16 and bf16.

    python -m benchmarks.gpu              on a machine with a GPU, at most eight minutes
    python -m benchmarks.gpu --rehearse   the same on a CPU at tiny widths, a minute

An engine of its own answers a client at its door. Beside it the same module runs in this process, where steps are timed
in turn with the served ones.
"""

import argparse
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._bench import conclude, in_turns, median_ms, scratch_home, show
from benchmarks.local_engine import LocalEngine, local_engine
from engine.checkpoints import detect, read_header
from engine.unet import UNet
from engine.weights import DTYPES, Weights
from luna_client.server import Server
from luna_protocol.blob import content_hash
from luna_protocol.messages import LoraUse, UNetForward
from tests import checkpoints
from tests.checkpoints import SHAPES, CheckpointShape, TextShape, UNetShape

BUDGET_SECONDS = 420.0  # parts that would begin later are left out, and named
GIB = 1 << 30
_TEXT = TextShape(64, 1)
FULL = {
    "sd15": (
        CheckpointShape(
            UNetShape(context=768, multipliers=(1, 2, 4, 4), depths=(1, 1, 1, 0), res_blocks=2),
            _TEXT,
            checkpoints.TAESD,
        ),
        64,
    ),
    "sdxl": (
        CheckpointShape(
            UNetShape(
                context=2048,
                multipliers=(1, 2, 4),
                depths=(0, 2, 10),
                middle_depth=10,
                res_blocks=2,
                y_features=2816,
                linear_projection=True,
            ),
            _TEXT,
            checkpoints.TAESD,
            clip_g=TextShape(1280, 1),
        ),
        128,
    ),
}
TINY = {"sd15": (SHAPES["tiny_sd15"], 8), "sdxl": (SHAPES["tiny_sdxl"], 8)}


@dataclass
class Subject:
    """A checkpoint, its UNet in this process, and the tensors of a step with cond and uncond, on the CPU."""

    name: str
    dtype: str
    file: Path
    unet: UNet
    tensors: dict[str, Tensor]

    @property
    def model(self) -> str:
        return f"{self.name}_{self.dtype}.unet"

    def in_process(self) -> Callable[[], Tensor]:
        device, dtype = self.unet.device, self.unet.dtype
        given = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        y = given["y"].to(dtype) if "y" in given else None

        def step() -> Tensor:
            x, context = given["x"].to(dtype), given["context"].to(dtype)
            out = self.unet.forward(x, given["timesteps"], context, y)
            synchronize(device)
            return out

        return step

    def served(self, server: Server, **fields: Any) -> Callable[[], Tensor]:
        names = ("context", "y") if "y" in self.tensors else ("context",)
        references = {name: content_hash(self.tensors[name]) for name in names}
        request = UNetForward(references=references, **fields)
        return lambda: server.call(self.model, request, self.tensors)[1]["out"]


class Report:
    """Tables as they come, and the JSON line last."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.result: dict[str, Any] = {"left_out": []}

    def part(self, name: str, run: Callable[[], tuple[list[str], list[list[Any]], Any]]) -> None:
        """One part: its table's columns and rows, and its figures."""
        if time.monotonic() - self.begun > BUDGET_SECONDS:
            self.result["left_out"].append(name)
            return
        columns, rows, figures = run()
        show(name, columns, rows)
        self.result[name] = figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny widths")
    options = parser.parse_args()
    cuda = torch.cuda.is_available() and not options.rehearse
    if not cuda and not options.rehearse:
        parser.error("there is no GPU here; --rehearse runs the same on the CPU")
    device, key = torch.device("cuda:0" if cuda else "cpu"), "0" if cuda else "cpu"
    shapes, rounds = (FULL, 10) if cuda else (TINY, 2)
    if not cuda:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    report = Report()
    report.result["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    with scratch_home() as home, torch.inference_mode(), local_engine(key, home / "run") as engine:
        server = engine.client()
        for name, (shape, side) in shapes.items():
            checkpoints.write(home / "models" / "checkpoints" / f"{name}.safetensors", shape, torch.float16)
            for dtype in ("fp16", "bf16") if cuda else ("fp32",):
                subject = prepare(home, name, dtype, shape, side, device)
                title = f"{name} {dtype}"
                report.part(f"{title}: load", lambda s=subject: load(engine, s, home))
                report.part(f"{title}: step", lambda s=subject: steps(server, s, rounds))
                if dtype in ("fp16", "fp32"):
                    lora_file = home / "models" / "loras" / f"{name}.safetensors"
                    checkpoints.write_lora(lora_file, shape, rank=16)
                    report.part(f"{title}: LoRA", lambda s=subject: lora(server, s, rounds))
                    report.part(f"{title}: ControlNet", lambda s=subject: control(server, s, rounds))
                    report.part(f"{title}: clients", lambda s=subject: clients(engine, s))
                    report.part(f"{title}: sampler", lambda s=subject: sampler(server, s))
                    report.part(f"{title}: parking", lambda s=subject: parking(s))
                engine.release(subject.model)
                subject.unet = None
        report.part("copies", lambda: copies(device))
        subject = prepare(home, "sd15", "fp16" if cuda else "fp32", *shapes["sd15"], device)
        report.part("sd15: compile", lambda: compiled(engine, server, subject, home, rounds))
    conclude(report.result)


def prepare(home: Path, name: str, dtype: str, shape: CheckpointShape, side: int, device: torch.device) -> Subject:
    file = home / "models" / "checkpoints" / f"{name}.safetensors"
    with torch.inference_mode(False):
        unet = UNet.load(file, detect(read_header(file)).parts["unet"], DTYPES[dtype], device)
    draw = torch.Generator().manual_seed(1)
    tensors = {
        "x": torch.randn(2, 4, side, side, generator=draw),
        "timesteps": torch.full((2,), 601.0),
        "context": torch.randn(2, 77, shape.unet.context, generator=draw),
    }
    if shape.unet.y_features:
        tensors["y"] = torch.randn(2, shape.unet.y_features, generator=draw)
    return Subject(name, dtype, file, unet, tensors)


def load(engine: LocalEngine, subject: Subject, home: Path, **more: Any) -> tuple:
    before = used_memory()
    settings = {"role": "unet", "home": str(home), "checkpoint": subject.file.name, "dtype": subject.dtype}
    seconds = engine.hold(subject.model, **settings, lora_overlay_mb=8192, **more)
    weights = engine.workers()[subject.model].weights_bytes
    taken = used_memory() - before
    figures = {"seconds": seconds, "weights_gib": weights / GIB, "vram_gib": taken / GIB, "contexts": contexts()}
    return ["seconds", "weights, GiB", "VRAM taken, GiB", "CUDA contexts"], [list(figures.values())], figures


def steps(server: Server, subject: Subject, rounds: int) -> tuple:
    here, there = subject.in_process(), subject.served(server)
    difference = (here().float().cpu() - there().float().cpu()).abs().max().item()
    with FlopCounterMode(display=False) as counter:
        here()
    timed = in_turns({"in process": here, "served": there}, rounds, 3)
    own, served = median_ms(timed["in process"]), median_ms(timed["served"])
    flops = counter.get_total_flops() / (own / 1e3)
    figures = {
        "in_process_ms": own,
        "served_ms": served,
        "served_over_in_process": served / own,
        "hop_ms": served - own,
        "share_of_peak": flops / peak(subject.unet.device, subject.unet.dtype),
        "largest_difference": difference,
    }
    columns = ["in process, ms", "served, ms", "ratio", "hop, ms", "share of peak", "largest difference"]
    return columns, [list(figures.values())], figures


def lora(server: Server, subject: Subject, rounds: int) -> tuple:
    plain = subject.served(server)
    stack = subject.served(server, lora=[LoraUse(name=subject.name, strength_patch=0.8)])
    begun = time.perf_counter()
    stack()
    first = (time.perf_counter() - begun) * 1e3
    timed = in_turns({"plain": plain, "steady": stack}, rounds, 3)
    ratio = median_ms(timed["steady"]) / median_ms(timed["plain"])
    figures = {"first_step_ms": first, "steady_over_plain": ratio}
    return ["first step, ms", "steady over plain"], [list(figures.values())], figures


def control(server: Server, subject: Subject, rounds: int) -> tuple:
    shapes = subject.unet.control_shapes(*subject.tensors["x"].shape[2:])
    residuals = {
        f"control.{place}.{number}": torch.zeros(2, *shape, dtype=torch.float16)
        for place in ("middle", "output")
        for number, shape in enumerate(shapes[place])
    }
    size = sum(tensor.nbytes for tensor in residuals.values()) / 1e6
    with_control = Subject(subject.name, subject.dtype, subject.file, subject.unet, subject.tensors | residuals)
    ways = {"plain": subject.served(server), "control": with_control.served(server)}
    timed = in_turns(ways, rounds, 3)
    added = median_ms(timed["control"]) - median_ms(timed["plain"])
    figures = {"mb": size, "added_ms": added}
    return ["residuals, MB", "added, ms"], [list(figures.values())], figures


def clients(engine: LocalEngine, subject: Subject) -> tuple:
    before, servers = used_memory(), [engine.client() for _ in range(3)]
    for server in servers:
        subject.served(server)()
    figures = {"vram_per_client_mb": (used_memory() - before) / len(servers) / 1e6}
    return ["VRAM a client, MB"], [list(figures.values())], figures


def sampler(server: Server, subject: Subject, count: int = 10) -> tuple:
    """Ten steps of euler around served forwards, its arithmetic on the CPU and on the device."""
    outcome, rows = [], []
    for place in ("cpu", str(subject.unet.device)):
        x = subject.tensors["x"].to(place)
        sigmas = torch.linspace(10, 0, count + 1).to(place)
        begun = time.perf_counter()
        for number in range(count):
            scaled = x / (sigmas[number] ** 2 + 1) ** 0.5
            step = Subject(
                subject.name, subject.dtype, subject.file, subject.unet, subject.tensors | {"x": scaled.cpu()}
            )
            x = x + step.served(server)().to(place).float() * (sigmas[number + 1] - sigmas[number])
        outcome.append(x.cpu())
        rows.append([place, (time.perf_counter() - begun) / count * 1e3])
    first, last = outcome
    error = (first - last).square().mean().sqrt().item()
    span = (last.max() - last.min()).item()
    decibels = float("inf") if not error else 20 * torch.log10(torch.tensor(span / error)).item()
    figures = {"ms": {place: each for place, each in rows}, "equal": torch.equal(first, last)}
    figures["db"] = min(decibels, 999.0)
    return ["sampler on", "ms a step"], rows, figures


def parking(subject: Subject) -> tuple:
    """Weights to host memory and back, in this process."""
    weights, device = Weights(subject.unet.model, lambda: subject.unet.model), subject.unet.device
    if device.type == "cpu":
        return ["nothing to park on a CPU"], [], {}
    rows = []
    for name, move in (("park", weights.park), ("unpark", lambda: weights.unpark(device))):
        begun = time.perf_counter()
        move()
        synchronize(device)
        rows.append([name, weights.nbytes / GIB / (time.perf_counter() - begun)])
    return ["", "GiB/s"], rows, dict(rows)


def copies(device: torch.device) -> tuple:
    """What page-locked memory is worth."""
    if device.type == "cpu":
        return ["no copies on a CPU"], [], {}
    size, rows = GIB, []
    target = torch.empty(size, dtype=torch.uint8, device=device)
    for name, locked in (("pageable", False), ("page-locked", True)):
        host = torch.empty(size, dtype=torch.uint8, pin_memory=locked)
        target.copy_(host)
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(3):
            target.copy_(host, non_blocking=locked)
        synchronize(device)
        rows.append([name, 3 * size / GIB / (time.perf_counter() - begun)])
    return ["host to device", "GiB/s"], rows, dict(rows)


def compiled(engine: LocalEngine, server: Server, subject: Subject, home: Path, rounds: int) -> tuple:
    _, _, figures = load(engine, subject, home, compile=True)
    timed = in_turns({"eager": subject.in_process(), "compiled": subject.served(server)}, rounds, 3)
    ratio = median_ms(timed["compiled"]) / median_ms(timed["eager"])
    figures = {"load_seconds": figures["seconds"], "served_over_eager": ratio}
    return ["load, s", "compiled and served over eager in process"], [list(figures.values())], figures


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, which is what this chip reaches at best."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.ones(2, side, side, dtype=dtype, device=device)
    a @ b
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * side**3 / (time.perf_counter() - begun)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used_memory() -> int:
    """Bytes of the GPU that all processes have; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def contexts() -> int:
    """Processes that hold a context on a GPU."""
    if not torch.cuda.is_available():
        return 0
    command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return len(done.stdout.split())


if __name__ == "__main__":
    main()
