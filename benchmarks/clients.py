"""What sharing brings: 1, 2, 4 and 8 clients stepping together through one server, against as many separate processes
that each load the model, on the same cores.

Random weights in fp32, cond and uncond of 128 x 128 px pictures: a miniature with --quick, else a full-width SD1.5
UNet. The server's worker may use every core; the separate processes share them out.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch

from benchmarks._bench import arguments, conclude, p99_ms, scratch_home, serving, show
from benchmarks.overhead import MINIATURE, SD15
from comfy_client.server import Server
from luna_protocol.blob import content_hash
from luna_protocol.messages import UNetForward
from serving.archives import pack_checkpoint
from serving.torchserve import ROOT
from tests import checkpoints

SIDE, PICTURE_STEPS = 16, 20
CORES = os.cpu_count()


class Client:
    """A process that loads, then steps when it is told to, then waits."""

    def __init__(self, way: dict, threads: int):
        command = [sys.executable, "-m", "benchmarks.clients", "--client", json.dumps(way)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = psutil.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def wait_ready(self) -> None:
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def seconds(self) -> list[float]:
        return json.loads(self.process.stdout.readline())


def main() -> None:
    options = arguments(__doc__)
    counts = (1, 4, 8) if options.quick else (1, 2, 4, 8)
    steps = 10
    shape = MINIATURE if options.quick else SD15
    rows, throughput, memory, one_model = [], {}, {}, 0
    with scratch_home() as home:
        file = home / "models" / "checkpoints" / "shared.safetensors"
        checkpoints.write(file, shape)
        archives = pack_checkpoint(file, home / "model_store", "shared", "fp32", home)
        [model] = [archive.model for archive in archives if archive.model.endswith(".unet")]
        os.environ["OMP_NUM_THREADS"] = str(CORES)
        with serving(home, [model]) as (torchserve, _):
            server = psutil.Process().children(recursive=True)
            addresses = {"inference": torchserve.inference, "management": torchserve.management}
            way = addresses | {"key_file": str(torchserve.key_file), "model": model, "steps": steps}
            way |= {"context_dim": shape.unet.context}
            for count in counts:
                local = run({"file": str(file), "steps": steps}, count, max(1, CORES // count), [])
                served = run(way, count, 1, server)
                one_model = one_model or local["pss"]
                throughput[str(count)] = served["pictures"] / local["pictures"]
                memory[str(count)] = served["pss"] / one_model
                for name, measured in (("one server", served), ("separate", local)):
                    figures = [measured[key] for key in ("pictures", "p50", "p99")]
                    rows.append([count, name, *figures, measured["pss"] / 1e6])
    show(
        f"{'Miniature' if options.quick else 'SD1.5'} at {SIDE * 8} px, {CORES} cores",
        ["clients", "", "pictures a minute", "p50 step, ms", "p99 step, ms", "PSS of all, MB"],
        rows,
    )
    conclude({"throughput_ratio": throughput, "memory_over_one_model": memory})


def run(way: dict, count: int, threads: int, others: list[psutil.Process]) -> dict[str, float]:
    """Pictures a minute of `count` clients together, their step times, and the memory of them and `others`."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(way | {"seed": seed}, threads)) for seed in range(count)]
        for client in clients:
            client.wait_ready()
        begun = time.perf_counter()
        for client in clients:
            client.go()
        seconds = [each for client in clients for each in client.seconds()]
        elapsed = time.perf_counter() - begun
        processes = [client.process for client in clients] + others
        pss = sum(process.memory_full_info().pss for process in processes)
    return {
        "pictures": count * way["steps"] / PICTURE_STEPS / elapsed * 60,
        "p50": statistics.median(seconds) * 1e3,
        "p99": p99_ms(seconds),
        "pss": pss,
    }


@torch.inference_mode()
def be_client(way: dict) -> None:
    generator = torch.Generator().manual_seed(way["seed"])
    if "file" in way:
        from handlers.engine.checkpoints import detect, read_header
        from handlers.engine.unet import UNet

        file = Path(way["file"])
        unet = UNet.load(file, detect(read_header(file)).parts["unet"], torch.float32, torch.device("cpu"))
        context = torch.randn(2, 77, unet.layout.context_dim, generator=generator)

        def step(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return unet.forward(x, timesteps, context)
    else:
        server = Server(way["inference"], way["management"], Path(way["key_file"]))
        context = torch.randn(2, 77, way["context_dim"], generator=generator)
        request = UNetForward(references={"context": content_hash(context)})

        def step(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            tensors = {"x": x, "timesteps": timesteps, "context": context}
            return server.call(way["model"], request, tensors)[1]["out"]

    x = torch.randn(2, 4, SIDE, SIDE, generator=generator)
    for _ in range(2):
        step(x, torch.full((2,), 999.0))
    print("ready", flush=True)
    sys.stdin.readline()
    seconds = []
    for number in range(way["steps"]):
        begun = time.perf_counter()
        x = x - 0.01 * step(x, torch.full((2,), 999.0 - number))
        seconds.append(time.perf_counter() - begun)
    print(json.dumps(seconds), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        be_client(json.loads(sys.argv[2]))
    else:
        main()
