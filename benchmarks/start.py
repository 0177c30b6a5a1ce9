"""How long a start takes: from scripts/serve.py to the first answer of a full-width SD1.5 UNet (with --quick a
miniature), against reading its checkpoint from the disk; and what the first request takes against those after it.

The checkpoint is a full file of random weights in fp16 (2.1 GB), served as the specs say: in fp32 on a CPU. Cold is
with the file dropped from the page cache, where the system lets us; Python's packages stay there.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks._bench import arguments, conclude, scratch_home, show
from benchmarks.overhead import MINIATURE, SD15
from luna_client.manager import Timeouts
from luna_client.server import Server
from luna_protocol.errors import LunaError
from luna_protocol.messages import UNetForward
from serving.archives import pack_checkpoint, pack_repository
from serving.torchserve import ROOT, Ports
from tests import checkpoints

FULL = checkpoints.CheckpointShape(SD15.unet, checkpoints.CLIP_L, checkpoints.KL)
PIECE = 16 << 20
LATER_REQUESTS = 9


class Start(NamedTuple):
    """Seconds from the command to the UNet's first answer, and to that of the last model; that first request's own,
    and those of the requests after it."""

    unet: float
    all_models: float
    first_request: float
    later_requests: list[float]


def main() -> None:
    options = arguments(__doc__)
    del os.environ["OMP_NUM_THREADS"]  # as a user starts it
    shape = MINIATURE if options.quick else FULL
    with scratch_home() as home:
        file = checkpoints.write(home / "models" / "checkpoints" / "it.safetensors", shape, torch.float16)
        pack_repository(home / "model_store", home)
        pack_checkpoint(file, home / "model_store", home=home)
        gigabytes = file.stat().st_size / 1e9
        drop(file)
        disk = read_seconds(file)
        cached = read_seconds(file)
        drop(file)
        cold = start(home, shape.unet.context)
        warm = start(home, shape.unet.context)
        # Their requests share the cores with nothing that loads.
        alone = [start(home, shape.unet.context, "--only", "unet") for _ in range(1 if options.quick else 3)]
    rows = [["read the file", disk, cached]]
    rows.append(["scripts/serve.py to the UNet's first answer", cold.unet, warm.unet])
    rows.append(["... to the first answer of every model", cold.all_models, warm.all_models])
    show(f"A checkpoint of {gigabytes:.2f} GB, {os.cpu_count()} cores", ["seconds", "cold", "cached"], rows)
    firsts = [one.first_request for one in alone]
    later = [statistics.median(one.later_requests) for one in alone]
    over_later = statistics.median(first / others for first, others in zip(firsts, later, strict=True))
    show(
        "Requests after a start (the UNet, cond and uncond, 128 px)",
        ["ms", *map(str, range(1, len(alone) + 1))],
        [
            ["the first", *(seconds * 1e3 for seconds in firsts)],
            ["those after it (median)", *(seconds * 1e3 for seconds in later)],
        ],
    )
    conclude(
        {
            "file_gb": gigabytes,
            "disk_s": disk,
            "cold_s": cold.unet,
            "warm_s": warm.unet,
            "all_ready_s": cold.all_models,
            "all_ready_warm_s": warm.all_models,
            "first_over_later_requests": over_later,
        }
    )


def drop(file: Path) -> None:
    """Forget the file's pages."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(file: Path) -> float:
    begun = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while opened.read(PIECE):
            pass
    return time.perf_counter() - begun


def start(home: Path, context_dim: int, *options: str) -> Start:
    """Start the server with what the store holds, ask for answers, and end it."""
    ports, run = Ports.free(), home / "run"
    command = [sys.executable, ROOT / "scripts" / "serve.py", "--port", str(ports.inference)]
    begun = time.perf_counter()
    served = subprocess.Popen(
        [*command, "--store", home / "model_store", "--run", run, *options], stdout=subprocess.DEVNULL, cwd=ROOT
    )
    try:
        server = Server(
            f"http://127.0.0.1:{ports.inference}",
            f"http://127.0.0.1:{ports.management}",
            run / "key_file.json",
            Timeouts(patience=0),
        )
        tensors = {"x": torch.randn(2, 4, 16, 16), "timesteps": torch.full((2,), 500.0)}
        tensors["context"] = torch.randn(2, 77, context_dim)

        def step() -> float:
            asked = time.perf_counter()
            server.call("it.unet", UNetForward(), tensors)
            return time.perf_counter() - asked

        def once_possible(call: Callable[[], None]) -> None:
            while served.poll() is None:
                try:
                    return call()
                except LunaError:  # nothing answers yet, or the model is not registered yet
                    time.sleep(0.05)
            raise SystemExit("serve.py ended while starting")

        # Asked earlier, it would wait in TorchServe's queue for its worker.
        once_possible(lambda: server.wait_ready(["it.unet"]))
        first = step()
        unet = time.perf_counter() - begun
        others = [] if options else ["it.clip", "it.vae", "repository"]
        once_possible(lambda: server.wait_ready(others))
        all_models = time.perf_counter() - begun
        return Start(unet, all_models, first, [step() for _ in range(LATER_REQUESTS)])
    finally:
        served.send_signal(signal.SIGTERM)
        served.wait(60)


if __name__ == "__main__":
    main()
