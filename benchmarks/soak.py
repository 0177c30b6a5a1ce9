"""Runs random work from several clients against a server of its own, and shows whether memory grows.

Each client samples with random LoRAs, step caches and early ends. After a warm-up of a fifth, the slope of every
process's memory is fitted over the steps. The base weights are checked by their output, to the same request before
and after.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy
import psutil
import torch
from rich.console import Console
from rich.table import Table

from comfy_client.server import Server
from luna_protocol.messages import LoraUse, StepCache, UNetForward
from serving.archives import pack_checkpoint, pack_repository
from serving.torchserve import Ports, TorchServe
from tests.checkpoints import write, write_lora

SHAPE, MODEL = "tiny_sd15", "tiny.unet"
STEPS_A_RUN = 20


def forward(server: Server, request: UNetForward, x: torch.Tensor, t: float) -> torch.Tensor:
    tensors = {"x": x, "timesteps": torch.full((len(x),), t), "context": torch.ones(len(x), 77, 64)}
    return server.call(MODEL, request, tensors)[1]["out"]


def client(server: Server, number: int, steps: list[int], enough: int, loras: list[str], faults: list[str]) -> None:
    chance = random.Random(number)
    run = 0
    while sum(steps) < enough:
        run += 1
        stack = [LoraUse(name=name, strength_patch=chance.uniform(-1, 1)) for name in loras if chance.random() < 0.5]
        session = f"soak-{number}-{run}" if chance.random() < 0.5 else None
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(run))
        # Some runs are cancelled halfway: nobody tells the server.
        for step in range(chance.randrange(3, STEPS_A_RUN) if chance.random() < 0.3 else STEPS_A_RUN):
            cache = session and StepCache(
                session=session, step=step, conds=["positive"], parameters={"residual_threshold": 0.1}
            )
            try:
                x = x - 0.05 * forward(server, UNetForward(lora=stack, step_cache=cache or None), x, 999 - 50 * step)
            except Exception as error:
                faults.append(f"{type(error).__name__}: {error}")
                break
            steps[number] += 1


def memory(processes: list[psutil.Process]) -> list[int]:
    return [process.memory_info().rss for process in processes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="in all (%(default)s)")
    parser.add_argument("--clients", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="300 steps")
    arguments = parser.parse_args()
    enough = 300 if arguments.quick else arguments.steps
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lunaserve-soak-") as folder:
        home = Path(folder)
        file = write(home / "models" / "checkpoints" / "tiny.safetensors", SHAPE)
        loras = [write_lora(home / "models" / "loras" / f"{n}.safetensors", SHAPE, seed=n).name for n in range(4)]
        pack_repository(home / "model_store", home)
        pack_checkpoint(file, home / "model_store", dtype="fp32", home=home)
        segments = set(Path("/dev/shm").glob("*")) if Path("/dev/shm").is_dir() else set()
        with TorchServe(home / "model_store", home / "run", Ports.free()) as torchserve:
            server = Server(torchserve.inference, torchserve.management, torchserve.key_file)
            for model in ("repository", MODEL):
                server.load(model)
            server.wait_ready(["repository", MODEL])
            x = torch.ones(1, 4, 16, 16)
            expected = forward(server, UNetForward(), x, 500)
            processes = psutil.Process(torchserve._guard.pid).children(recursive=True)
            steps, faults = [0] * arguments.clients, []
            threads = [
                threading.Thread(target=client, args=(server, number, steps, enough, loras, faults))
                for number in range(arguments.clients)
            ]
            begun = time.monotonic()
            for thread in threads:
                thread.start()
            readings = []
            while any(thread.is_alive() for thread in threads):
                readings.append((sum(steps), memory(processes)))
                time.sleep(1)
            seconds = time.monotonic() - begun
            unchanged = torch.equal(forward(server, UNetForward(), x, 500), expected)
            names = [process.name() if "java" in process.name() else "worker" for process in processes]
            server._http.clear()
        leaked = len(set(Path("/dev/shm").glob("*")) - segments) if Path("/dev/shm").is_dir() else 0
    late = [reading for reading in readings if reading[0] > enough / 5] or readings
    done = numpy.array([reading[0] for reading in late], dtype=float)
    table = Table("process", "MB at the end", "MB per 1,000 steps")
    slopes = {}
    for number, name in enumerate(names):
        sizes = numpy.array([reading[1][number] for reading in late]) / 1e6
        slope = float(numpy.polyfit(done, sizes, 1)[0] * 1000) if len(set(done)) > 1 else 0.0
        slopes[f"{name} {number}"] = round(slope, 3)
        table.add_row(f"{name} {number}", f"{sizes[-1]:.0f}", f"{slope:+.2f}")
    Console().print(table)
    for fault in sorted(set(faults)):
        print(f"{faults.count(fault)} x {fault}")
    result = {"steps": sum(steps), "seconds": round(seconds, 1), "faults": len(faults), "mb_per_1000_steps": slopes}
    print(json.dumps(result | {"base_unchanged": unchanged, "leaked_segments": leaked}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
