"""Work that repeats itself takes no more memory than it did at first; benchmarks/soak.py is the long version."""

import gc
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from luna_client.server import Server
from luna_protocol.messages import LoraUse, StepCache, UNetForward
from luna_protocol.shared_memory import FOLDER as SEGMENTS
from serving.torchserve import TorchServe
from tests.checkpoints import write_lora
from tests.conftest import connect

CLIENTS, RUNS, STEPS = 4, 5, 8
MB = 1e6


def sample(torchserve: TorchServe, model: str, loras: list[str], number: int) -> None:
    """Some short sampling runs of a new client, the same each time for the same number."""
    server, chance = connect(torchserve), random.Random(number)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(number))
    for run in range(RUNS):
        stack = [LoraUse(name=name, strength_patch=0.5) for name in loras if chance.random() < 0.5]
        for step in range(STEPS):
            cache = StepCache(session=f"growth-{number}-{run}", step=step, conds=["c"]) if run % 2 else None
            tensors = {"x": x, "timesteps": torch.full((1,), 999.0 - 100 * step), "context": torch.ones(1, 77, 64)}
            server.call(model, UNetForward(lora=stack, step_cache=cache), tensors)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="counts POSIX file descriptors")
def test_memory_stays_as_it_was_after_the_first_rounds(torchserve, server: Server, served_tiny, home: Path) -> None:
    model = f"{served_tiny}.unet"
    folder = home / "models" / "loras"
    loras = [write_lora(folder / f"growth{seed}.safetensors", "tiny_sd15", seed=seed).name for seed in range(3)]
    [engine] = (each.workers[0].pid for each in server.index().models if each.name == model)
    worker = psutil.Process(engine)
    segments = set(SEGMENTS.glob(f"luna-{os.getpid()}-*"))
    used, opened = [], []
    for _ in range(6):
        with ThreadPoolExecutor(CLIENTS) as threads:
            list(threads.map(lambda number: sample(torchserve, model, loras, number), range(CLIENTS)))
        gc.collect()  # or clients that are done with would keep their segments for a while
        used.append(worker.memory_full_info().uss / MB)
        opened.append(worker.num_fds())
    print("MB", [f"{each:.1f}" for each in used], "open files", opened)
    # A request's tensors are 30 kB: what 160 of them leave behind would be 5 MB a round, an overlay each 40 MB.
    assert used[-1] - used[1] < 6, used
    assert opened[-1] - opened[1] < 4 * CLIENTS, opened
    assert set(SEGMENTS.glob(f"luna-{os.getpid()}-*")) <= segments
