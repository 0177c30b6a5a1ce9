"""What sharing brings: 1, 2, 4 and 8 clients stepping together through one server, against as many separate processes
that each load the model, on the same cores.

Random weights in fp32, cond and uncond of 128 x 128 px pictures: a miniature with --quick, else a full-width SD1.5
UNet. The server's worker may use every core; the separate processes share them out.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil

from benchmarks._bench import arguments, conclude, p99_ms, scratch_home, serving, show
from benchmarks.overhead import MINIATURE, SD15
from benchmarks.stepping_client import SIDE
from serving.archives import pack_checkpoint
from serving.torchserve import ROOT
from tests import checkpoints

PICTURE_STEPS = 20
CORES = os.cpu_count()


class Client:
    """A process that loads, then steps whenever it is told to."""

    def __init__(self, way: dict):
        command = [sys.executable, "-m", "benchmarks.stepping_client", json.dumps(way)]
        self.process = psutil.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(self, threads: int, steps: int) -> None:
        print(threads, steps, file=self.process.stdin, flush=True)

    def seconds(self) -> list[float]:
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def main() -> None:
    options = arguments(__doc__)
    counts, shape, steps = ((8, 4, 1), MINIATURE, 5) if options.quick else ((8, 4, 2, 1), SD15, 6)
    rows, throughput, memory = [], {}, {}
    with scratch_home() as home, ExitStack() as stack:
        file = checkpoints.write(home / "models" / "checkpoints" / "shared.safetensors", shape)
        # A file of their own, or they would share the server's pages.
        own = shutil.copy(file, home / "own.safetensors")
        archives = pack_checkpoint(file, home / "model_store", "shared", "fp32", home)
        [model] = [archive.model for archive in archives if archive.model.endswith(".unet")]
        os.environ["OMP_NUM_THREADS"] = str(CORES)
        torchserve, _ = stack.enter_context(serving(home, [model]))
        server = psutil.Process().children(recursive=True)
        addresses = {"inference": torchserve.inference, "management": torchserve.management}
        way = addresses | {"key_file": str(torchserve.key_file), "model": model, "context_dim": shape.unet.context}
        served, local = (
            [Client(way | {"seed": seed}) for seed in range(max(counts))] for way in (way, {"file": str(own)})
        )
        for client in (*served, *local):
            stack.callback(client.end)
            client.go(1, 1)  # loads, and runs once
        for client in (*served, *local):
            client.seconds()
        # Downwards, and whoever is not needed any more ends: the memory that is left is that of those who are.
        for count in counts:
            for client in (*served[count:], *local[count:]):
                client.end()
            del served[count:], local[count:]
            shared = together(served, 1, steps, server)
            separate = together(local, max(1, CORES // count), steps, [])
            throughput[str(count)] = shared["pictures"] / separate["pictures"]
            memory[str(count)] = shared["pss"]
            for name, measured in (("separate", separate), ("one server", shared)):
                figures = [measured[key] for key in ("pictures", "p50", "p99")]
                rows.append([count, name, *figures, measured["pss"] / 1e6])
        one_model = separate["pss"]
    show(
        f"{'Miniature' if options.quick else 'SD1.5'} at {SIDE * 8} px, {CORES} cores",
        ["clients", "", "pictures a minute", "p50 step, ms", "p99 step, ms", "PSS of all, MB"],
        rows[::-1],
    )
    conclude(
        {
            "throughput_ratio": dict(reversed(throughput.items())),
            "memory_over_one_model": {count: pss / one_model for count, pss in reversed(memory.items())},
        }
    )


def together(clients: list[Client], threads: int, steps: int, others: list[psutil.Process]) -> dict[str, float]:
    """Pictures a minute of all clients at once, their step times, and the memory of them and `others`."""
    for count in (2, steps):  # the first steps of a batch's size make its kernels
        begun = time.perf_counter()
        for client in clients:
            client.go(threads, count)
        seconds = [each for client in clients for each in client.seconds()]
        elapsed = time.perf_counter() - begun
    processes = [client.process for client in clients] + others
    return {
        "pictures": len(clients) * steps / PICTURE_STEPS / elapsed * 60,
        "p50": statistics.median(seconds) * 1e3,
        "p99": p99_ms(seconds),
        "pss": sum(process.memory_full_info().pss for process in processes),
    }


if __name__ == "__main__":
    main()
