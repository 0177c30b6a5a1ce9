"""One of the clients of clients.py: it steps as each line of its input says, `served THREADS STEPS` with a server's
UNet or `local THREADS STEPS` with one of its own, and tells the seconds of each step."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from luna_protocol.blob import content_hash
from luna_protocol.messages import UNetForward

SIDE = 16

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


# Each imports what it needs when it is asked for: the memory of those that never ask is measured.
def served(way: dict, context: torch.Tensor) -> Step:
    from luna_client.server import Server

    server = Server(way["inference"], way["management"], Path(way["key_file"]))
    request = UNetForward(references={"context": content_hash(context)})

    def step(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return server.call(way["model"], request, {"x": x, "timesteps": timesteps, "context": context})[1]["out"]

    return step


def local(way: dict, context: torch.Tensor) -> Step:
    from engine.checkpoints import detect, read_header
    from engine.unet import UNet

    file = Path(way["file"])
    unet = UNet.load(file, detect(read_header(file)).parts["unet"], torch.float32, torch.device("cpu"))
    return lambda x, timesteps: unet.forward(x, timesteps, context)


@torch.inference_mode()
def main(way: dict) -> None:
    generator = torch.Generator().manual_seed(way["seed"])
    rows = way.get("rows", 2)
    context = torch.randn(rows, 77, way["context_dim"], generator=generator)
    x = torch.randn(rows, 4, SIDE, SIDE, generator=generator)
    loaded: dict[str, Step] = {}
    for line in sys.stdin:
        name, threads, steps = line.split()
        if name not in loaded:
            loaded[name] = {"served": served, "local": local}[name](way, context)
        torch.set_num_threads(int(threads))
        seconds = []
        for number in range(int(steps)):
            begun = time.perf_counter()
            x = x - 0.01 * loaded[name](x, torch.full((rows,), 999.0 - number))
            seconds.append(time.perf_counter() - begun)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
