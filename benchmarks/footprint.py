"""What a server costs beside its weights: PSS of all its processes with 1, 2 and 4 checkpoints of three parts each, and
how long they take to be ready.

Miniatures of random weights on a CPU, where a checkpoint's own 35 MB are mapped and counted once.
"""

import os
import time
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks._bench import arguments, conclude, connect, scratch_home, show
from serving.archives import pack_checkpoint, pack_repository
from serving.loading import load
from serving.torchserve import Ports, TorchServe
from tests import checkpoints

PARTS = ("unet", "clip", "vae")


def main() -> None:
    options = arguments(__doc__)
    counts = (1, 4) if options.quick else (1, 2, 4)
    with scratch_home() as home:
        pack_repository(home / "model_store", home)
        for number in range(max(counts)):
            file = checkpoints.write(home / "models" / "checkpoints" / f"m{number}.safetensors", "tiny_sd15")
            pack_checkpoint(file, home / "model_store", dtype="fp32", home=home)
        found = {count: served(home, count) for count in counts}
    rows = [[count, *found[count]] for count in counts]
    show(f"A server on {os.cpu_count()} cores", ["checkpoints", "PSS, MB", "processes", "ready after, s"], rows)
    least, most = min(counts), max(counts)
    conclude(
        {
            "base_mb": found[least][0],
            "per_checkpoint_mb": (found[most][0] - found[least][0]) / (most - least),
            "processes": found[least][1],
            "ready_s": {str(count): seconds for count, (_, _, seconds) in found.items()},
        }
    )


def served(home: Path, count: int) -> tuple[float, int, float]:
    """PSS in MB, processes, and seconds until all models answered, of a fresh server with so many checkpoints."""
    models = ["repository", *(f"m{number}.{part}" for number in range(count) for part in PARTS)]
    with TorchServe(home / "model_store", home / "run", Ports.free()) as torchserve:
        begun = time.monotonic()
        load(connect(torchserve), models, Console(quiet=True))
        seconds = time.monotonic() - begun
        processes = psutil.Process(torchserve._guard.pid).children(recursive=True)
        return sum(process.memory_full_info().pss for process in processes) / 1e6, len(processes), seconds


if __name__ == "__main__":
    main()
