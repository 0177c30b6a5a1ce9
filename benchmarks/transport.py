"""What one step costs beside its forward: the round trip of an SDXL step at 1024 px to a UNet that returns at once."""

import http.client
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks._bench import (
    arguments,
    conclude,
    connect,
    in_turns,
    median_ms,
    p99_ms,
    pack_handler,
    pack_unet,
    scratch_home,
    serving,
    show,
)
from benchmarks.origin_way import Origin
from luna_client.server import Server
from luna_client.transport import Transport
from luna_protocol.blob import content_hash
from luna_protocol.messages import UNetForward
from serving.torchserve import TorchServe
from tests import checkpoints

HERE = Path(__file__).resolve().parent
BATCH = {"batchSize": 4, "maxBatchDelay": 1}  # as archive_specs/unet.yaml
ALONE = {"batchSize": 1, "maxBatchDelay": 1}
COMMON = {"minWorkers": 1, "maxWorkers": 1, "responseTimeout": 120, "startupTimeout": 120, "deviceType": "cpu"}
ECHO_BYTES = 1024


def step_tensors() -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(2, 4, 128, 128).half(),
        "timesteps": torch.full((2,), 601.0),
        "context": torch.randn(2, 77, 2048).half(),
        "y": torch.randn(2, 2816).half(),
    }


def control_tensors() -> dict[str, torch.Tensor]:
    """What an SDXL ControlNet adds to a step of two rows at 1024 px, in fp16: 107 MB."""
    shapes = [(320, 128)] * 3 + [(320, 64)] + [(640, 64)] * 2 + [(640, 32)] + [(1280, 32)] * 2
    residuals = {f"control.output.{i}": torch.randn(2, c, s, s).half() for i, (c, s) in enumerate(reversed(shapes))}
    return residuals | {"control.middle.0": torch.randn(2, 1280, 32, 32).half()}


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        home = stack.enter_context(scratch_home())
        file = checkpoints.write(home / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
        handler = {"role": "unet", "home": str(home), "dtype": "fp16", "checkpoint": file.name}
        ours = COMMON | {"handler": handler}
        models = [
            pack_unet(home, "batched.unet", HERE / "instant_unet.py", ours | BATCH),
            pack_unet(home, "alone.unet", HERE / "instant_unet.py", ours | ALONE),
            pack_handler(home, "batched.echo", HERE / "echo_handler.py", COMMON | BATCH),
            pack_handler(home, "alone.echo", HERE / "echo_handler.py", COMMON | ALONE),
        ]
        torchserve, door = stack.enter_context(serving(home, models))
        shared = connect(torchserve, doors=False)
        bodies = connect(torchserve, doors=False)
        bodies._transport = Transport("http://elsewhere")
        origin = stack.enter_context(Origin())
        plain, control = step_tensors(), step_tensors() | control_tensors()
        ways = {
            "ours, the engine's door": step(door, "batched.unet", plain),
            "ours, HTTP and shared memory": step(shared, "batched.unet", plain),
            "the same, not batched": step(shared, "alone.unet", plain),
            "ours, HTTP body": step(bodies, "batched.unet", plain),
            "TorchServe's floor: an echo of 1 KB": echo(torchserve, "batched.echo"),
            "that floor, not batched": echo(torchserve, "alone.echo"),
            "the origin's way": lambda: origin.step(plain),
        }
        seconds = in_turns(ways, 3 if options.quick else 12, 20 if options.quick else 40, warm_up=20)
        heavy = {
            "ours, the engine's door": step(door, "alone.unet", control),
            "ours, HTTP and shared memory": step(shared, "alone.unet", control),
            "the origin's way": lambda: origin.step(control),
        }
        heavy_seconds = in_turns(heavy, 3 if options.quick else 8, 3)
    size = sum(tensor.nbytes for tensor in control.values()) / 1e6
    columns = ["", "median, ms", "99 of 100, ms"]
    show("One SDXL step at 1024 px, no forward", columns, [[n, median_ms(s), p99_ms(s)] for n, s in seconds.items()])
    show(f"The same with {size:.0f} MB", columns, [[n, median_ms(s), p99_ms(s)] for n, s in heavy_seconds.items()])
    door_ms, shm, unbatched, http_ms, floor, unbatched_floor, origin_ms = (median_ms(s) for s in seconds.values())
    control_door, control_shm, control_origin = (median_ms(s) for s in heavy_seconds.values())
    conclude(
        {
            "door_ms": door_ms,
            "door_over_origin": door_ms / origin_ms,
            "control_door_over_origin": control_door / control_origin,
            "shm_ms": shm,
            "http_ms": http_ms,
            "floor_ms": floor,
            "origin_ms": origin_ms,
            "shm_over_floor": shm / floor,
            "unbatched_shm_ms": unbatched,
            "unbatched_shm_over_floor": unbatched / unbatched_floor,
            "control_mb": size,
            "control_shm_ms": control_shm,
            "control_shm_over_origin": control_shm / control_origin,
        }
    )


def step(server: Server, model: str, tensors: dict[str, torch.Tensor]) -> Callable[[], None]:
    request = UNetForward(references={name: content_hash(tensors[name]) for name in ("context", "y")})

    def call() -> None:
        _, reply = server.call(model, request, tensors)
        assert reply["out"].shape == tensors["x"].shape

    return call


def echo(torchserve: TorchServe, model: str) -> Callable[[], None]:
    """The quickest client there is: one kept-alive connection of the standard library."""
    connection = http.client.HTTPConnection("127.0.0.1", torchserve.ports.inference)
    key = json.loads(torchserve.key_file.read_text())["inference"]["key"]
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/octet-stream"}
    body = bytes(ECHO_BYTES)

    def call() -> None:
        connection.request("POST", f"/predictions/{model}", body, headers)
        assert len(connection.getresponse().read()) == ECHO_BYTES

    return call


if __name__ == "__main__":
    main()
