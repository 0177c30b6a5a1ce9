"""What sharing brings: 1, 2, 4 and 8 clients stepping together through one server, against as many separate processes
that each load the model, on the same cores; and how long the steps of a single picture take beside a batch of 16.

Random weights in fp32, cond and uncond of 128 x 128 px pictures: a miniature with --quick, else a full-width SD1.5
UNet. The server's worker may use every core; the separate processes share them out. They are the clients themselves,
which then load the model too.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
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
    """A process that steps whenever it is told to, and loads what it needs for that the first time."""

    def __init__(self, way: dict, seed: int):
        command = [sys.executable, "-m", "benchmarks.stepping_client", json.dumps(way | {"seed": seed})]
        self.process = psutil.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def go(self, way: str, threads: int, steps: int) -> None:
        print(way, threads, steps, file=self.process.stdin, flush=True)

    def seconds(self) -> list[float]:
        return json.loads(self.process.stdout.readline())


def main() -> None:
    options = arguments(__doc__)
    counts, shape, steps = ((1, 4, 8), MINIATURE, 5) if options.quick else ((1, 2, 4, 8), SD15, 6)
    with scratch_home() as home, ExitStack() as stack:
        file = checkpoints.write(home / "models" / "checkpoints" / "shared.safetensors", shape)
        archives = pack_checkpoint(file, home / "model_store", "shared", "fp32", home)
        [model] = [archive.model for archive in archives if archive.model.endswith(".unet")]
        os.environ["OMP_NUM_THREADS"] = str(CORES)
        torchserve, _ = stack.enter_context(serving(home, [model]))
        server = psutil.Process().children(recursive=True)
        way = {
            "inference": torchserve.inference,
            "management": torchserve.management,
            "key_file": str(torchserve.key_file),
            "model": model,
            "context_dim": shape.unet.context,
            # A file of its own, or whoever loads it would share the server's pages.
            "file": str(shutil.copy(file, home / "own.safetensors")),
        }

        clients: list[Client] = []
        stack.callback(end, clients)
        clients.append(Client(way, 0))
        together(clients, "local", CORES, 1)
        one_model = pss([clients[0].process])
        end(clients)

        memory = {}
        for count in counts:
            clients += [Client(way, seed) for seed in range(len(clients), count)]
            together(clients, "served", 1, 1)
            memory[count] = pss(client.process for client in clients) + pss(server)

        rows, throughput = [], {}
        # Downwards, and whoever is not needed any more ends: pages are shared among those who are there.
        for count in reversed(counts):
            end(clients, but=count)
            shared = stepping(clients, "served", 1, steps)
            separate = stepping(clients, "local", max(1, CORES // count), steps)
            throughput[str(count)] = shared["pictures"] / separate["pictures"]
            rows.append([count, "separate", *separate.values(), pss(client.process for client in clients) / 1e6])
            rows.append([count, "one server", *shared.values(), memory[count] / 1e6])
        end(clients)
        single = single_beside_batch(way, 30 if options.quick else 60)
    show(
        f"{'Miniature' if options.quick else 'SD1.5'} at {SIDE * 8} px, {CORES} cores",
        ["clients", "", "pictures a minute", "p50 step, ms", "p99 step, ms", "PSS of all, MB"],
        rows[::-1],
    )
    conclude(
        {
            "throughput_ratio": dict(reversed(throughput.items())),
            "memory_over_one_model": {str(count): size / one_model for count, size in memory.items()},
            "single_p99_over_batch": single,
        }
    )


def stepping(clients: list[Client], way: str, threads: int, steps: int) -> dict[str, float]:
    """Pictures a minute of all clients at once, and the median and the 99th percentile of their steps in ms."""
    together(clients, way, threads, 2)  # the first steps of a batch's size make its kernels
    begun = time.perf_counter()
    seconds = together(clients, way, threads, steps)
    elapsed = time.perf_counter() - begun
    return {
        "pictures": len(clients) * steps / PICTURE_STEPS / elapsed * 60,
        "p50": statistics.median(seconds) * 1e3,
        "p99": p99_ms(seconds),
    }


def single_beside_batch(way: dict, steps: int) -> float:
    """The 99th percentile of a single picture's steps while another client steps with a batch of 16, over the median
    of that batch's steps alone."""
    clients = [Client(way | {"rows": 32}, 0), Client(way, 1)]
    batch, single = clients
    alone = statistics.median(together([batch], "served", 1, 5)[1:])
    together([single], "served", 1, 2)
    batch.go("served", 1, steps)
    single.go("served", 1, steps)
    beside = p99_ms(single.seconds()) / 1e3
    batch.seconds()
    end(clients)
    return beside / alone


def together(clients: list[Client], way: str, threads: int, steps: int) -> list[float]:
    """Have all clients step at once; the seconds of each step of each."""
    for client in clients:
        client.go(way, threads, steps)
    return [each for client in clients for each in client.seconds()]


def end(clients: list[Client], but: int = 0) -> None:
    """End all clients but the first few."""
    for client in clients[but:]:
        client.process.stdin.close()
    for client in clients[but:]:
        client.process.wait(30)
    del clients[but:]


def pss(processes: Iterable[psutil.Process]) -> int:
    """Bytes, each page divided among those who share it."""
    return sum(process.memory_full_info().pss for process in processes)


if __name__ == "__main__":
    main()
