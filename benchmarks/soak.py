"""Runs random work from several clients against a server of its own, and shows whether it wears out.

Each client samples with random LoRAs and step caches; some of its runs end early, and some of its requests are given up
while they run. The caches are kept small, so that they are full, and evict, from early on. Memory and open files of
every process are read each second, and after a warm-up of a fifth a line is fitted to them over the steps. Ctrl-C ends
it early, with what it has by then.

That the base weights stay as they are is told by their pages: they are mapped from the checkpoint's file, and a write
to one would have made the worker a page of its own.
"""

import argparse
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy
import psutil
import torch
import yaml

from benchmarks._bench import conclude, connect, scratch_home, serving, show
from luna_client.manager import Timeouts
from luna_client.server import Server
from luna_protocol.errors import LunaError, Unavailable
from luna_protocol.messages import LoraUse, StepCache, UNetForward
from luna_protocol.shared_memory import FOLDER as SEGMENTS
from serving.archives import pack_checkpoint
from serving.specs import FOLDER as SPECS
from serving.torchserve import TorchServe
from tests.checkpoints import write, write_lora

SHAPE, MODEL = "tiny_sd15", "tiny.unet"
STEPS_A_RUN = 20
CACHES = {"tensor_cache_mb": 8, "lora_cache_mb": 8, "lora_overlay_mb": 64, "step_cache_mb": 8, "step_cache_ttl": 20}


def forward(server: Server, request: UNetForward, x: torch.Tensor, t: float) -> torch.Tensor:
    tensors = {"x": x, "timesteps": torch.full((len(x),), float(t)), "context": torch.ones(len(x), 77, 64)}
    return server.call(MODEL, request, tensors)[1]["out"]


@dataclass
class Work:
    """What the clients share: the steps that they made, those that they gave up, and what went wrong."""

    enough: int
    loras: list[str]
    given_up: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.done)


def client(work: Work, connected: Callable[..., Server], number: int) -> None:
    """Samples until all clients together have made enough steps."""
    chance = random.Random(number)
    server, hasty = connected(), connected(answer=0.02)
    run = 0
    while work.steps < work.enough:
        run += 1
        names = [name for name in work.loras if chance.random() < 0.5]
        stack = [LoraUse(name=name, strength_patch=chance.uniform(-1, 1)) for name in names]
        session = f"soak-{number}-{run}" if chance.random() < 0.5 else None
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(run))
        # Some runs are cancelled halfway: nobody tells the server.
        steps = chance.randrange(3, STEPS_A_RUN) if chance.random() < 0.3 else STEPS_A_RUN
        for step in range(steps):
            cache = session and StepCache(
                session=session, step=step, conds=["positive"], parameters={"residual_threshold": 0.1}
            )
            request, t = UNetForward(lora=stack, step_cache=cache or None), 999 - 50 * step
            try:
                if chance.random() < 0.02:
                    try:
                        forward(hasty, request, x, t)
                    except Unavailable:
                        work.given_up.append(step)
                x = x - 0.05 * forward(server, request, x, t)
            except LunaError as error:
                work.faults.append(f"{type(error).__name__}: {error}")
                break
            work.done.append(step)


@dataclass
class Reading:
    """At `steps`: each process's resident bytes and open files, and how many files lie under the server's folders."""

    steps: int
    memory: list[int]
    open_files: list[int]
    files: int


def read(work: Work, processes: list[psutil.Process], folders: list[Path]) -> Reading:
    files = sum(path.is_file() for folder in folders for path in folder.rglob("*") if "logs" not in path.parts)
    memory = [process.memory_info().rss for process in processes]
    opened = [process.num_fds() if os.name == "posix" else process.num_handles() for process in processes]
    return Reading(work.steps, memory, opened, files)


def written_to(process: psutil.Process, file: Path) -> int | None:
    """Bytes of its mapping of `file` that the process has changed for itself; only Linux tells."""
    if sys.platform != "linux":
        return None
    return sum(each.private_dirty for each in process.memory_maps() if each.path == str(file))


def soak(torchserve: TorchServe, work: Work, clients: int, checkpoint: Path, folders: list[Path]) -> dict:
    server = connect(torchserve)
    x = torch.ones(1, 4, 16, 16)
    expected = forward(server, UNetForward(), x, 500)
    processes = psutil.Process(torchserve._guard.pid).children(recursive=True)
    names = ["java" if "java" in process.name() else "worker" for process in processes]
    [engine] = (model.workers[0].pid for model in server.index().models if model.name == MODEL)
    names[processes.index(psutil.Process(engine))] = "engine"

    def connected(**timeouts: float) -> Server:
        return Server(torchserve.inference, torchserve.management, torchserve.key_file, Timeouts(**timeouts))

    threads = [threading.Thread(target=client, args=(work, connected, number)) for number in range(clients)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    readings = []
    while any(thread.is_alive() for thread in threads):
        try:
            readings.append(read(work, processes, folders))
            time.sleep(1)
        except KeyboardInterrupt:
            work.enough = 0
    seconds = time.monotonic() - begun
    late = [reading for reading in readings if reading.steps >= work.steps / 5]
    done = numpy.array([reading.steps for reading in late], dtype=float)
    rows, slopes = [], {}
    for number, name in enumerate(names):
        sizes = numpy.array([reading.memory[number] for reading in late]) / 1e6
        slope, start = numpy.polyfit(done, sizes, 1) if len(set(done)) > 1 else (0.0, sizes[0])
        noise = float(numpy.std(sizes - slope * done - start))
        opened = late[0].open_files[number], late[-1].open_files[number]
        slopes[name] = float(slope) * 1000
        rows.append([name, sizes[0], sizes[-1], f"{slope * 1000:+.2f}", f"{noise:.2f}", f"{opened[0]} - {opened[1]}"])
    columns = ["process", "MB after a fifth", "MB at the end", "MB per 1,000 steps", "spread, MB", "open files"]
    show(f"{work.steps} steps of {clients} clients in {seconds:.0f} s", columns, rows)
    for fault in sorted(set(work.faults)):
        print(f"{work.faults.count(fault)} x {fault}")
    return {
        "steps": work.steps,
        "seconds": seconds,
        "given_up": len(work.given_up),
        "faults": len(work.faults),
        "mb_per_1000_steps": slopes,
        "files_after_a_fifth": late[0].files,
        "files_at_the_end": late[-1].files,
        "same_answer": torch.equal(forward(server, UNetForward(), x, 500), expected),
        "base_bytes_written": written_to(psutil.Process(engine), checkpoint),
        "same_processes": all(process.is_running() for process in processes),
    }


def segments() -> set[Path]:
    return set(SEGMENTS.glob("luna-*")) if SEGMENTS.is_dir() else set()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="in all (%(default)s)")
    parser.add_argument("--clients", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="300 steps")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    before, scratch_before = segments(), set(Path(tempfile.gettempdir()).glob("lunaserve-*"))
    with scratch_home() as home:
        file = write(home / "models" / "checkpoints" / "tiny.safetensors", SHAPE)
        loras = [write_lora(home / "models" / "loras" / f"{n}.safetensors", SHAPE, seed=n).name for n in range(4)]
        specs = home / "specs"
        specs.mkdir()
        for path in SPECS.glob("*.yaml"):
            spec = yaml.safe_load(path.read_text())
            spec["handler"] |= CACHES if path.stem == "unet" else {}
            (specs / path.name).write_text(yaml.safe_dump(spec))
        pack_checkpoint(file, home / "model_store", dtype="fp32", home=home, specs=specs)
        work = Work(300 if arguments.quick else arguments.steps, loras)
        with serving(home, [MODEL]) as (torchserve, _):
            scratch = set(Path(tempfile.gettempdir()).glob("lunaserve-*")) - scratch_before
            result = soak(torchserve, work, arguments.clients, file, [home, *scratch])
        result["leaked_folders"] = sum(folder.exists() for folder in scratch)
    gc.collect()
    conclude(result | {"leaked_segments": len(segments() - before)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
