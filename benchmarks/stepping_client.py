"""One of the clients of clients.py: it steps, as often and in as many threads as each line of its input says, and tells
the seconds of each step. Its UNet is a server's or, where it is given a file, its own."""

import json
import sys
import time
from pathlib import Path

import torch

from comfy_client.server import Server
from luna_protocol.blob import content_hash
from luna_protocol.messages import UNetForward

SIDE = 16


@torch.inference_mode()
def main(way: dict) -> None:
    generator = torch.Generator().manual_seed(way["seed"])
    if "file" in way:
        # Not imported by clients of a server: their memory is measured.
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
    for line in sys.stdin:
        threads, steps = map(int, line.split())
        torch.set_num_threads(threads)
        seconds = []
        for number in range(steps):
            begun = time.perf_counter()
            x = x - 0.01 * step(x, torch.full((2,), 999.0 - number))
            seconds.append(time.perf_counter() - begun)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
