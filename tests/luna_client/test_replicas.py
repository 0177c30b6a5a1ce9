"""Two replicas of a real UNet, and runs that spread over them."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from luna_client.replicas import Replicas
from luna_client.server import Server
from luna_protocol.errors import NotFound
from luna_protocol.messages import UNetForward
from serving.archives import pack_checkpoint
from serving.specs import FOLDER
from serving.torchserve import TorchServe
from tests.checkpoints import write
from tests.conftest import connect

NAMES = ("twice.unet", "twice.unet.1")


def inputs(rows: int, size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(rows, 4, size, size, generator=generator),
        "timesteps": torch.full((rows,), 500.0),
        "context": torch.randn(rows, 77, 64, generator=generator),
    }


@pytest.fixture
def twice(home: Path, server: Server, tmp_path: Path) -> None:
    specs = Path(shutil.copytree(FOLDER, tmp_path / "specs"))
    spec = specs / "unet.yaml"
    spec.write_text(spec.read_text().replace("\nreplicas: 1", "\nreplicas: 2"))
    file = write(home / "models" / "checkpoints" / "twice.safetensors", "tiny_sd15")
    pack_checkpoint(file, home / "model_store", dtype="fp32", home=home, specs=specs)
    for name in NAMES:
        server.register(f"{name}.mar")
    server.wait_ready(NAMES)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_runs_spread_over_replicas_and_move_when_one_fails(twice, server: Server, torchserve: TorchServe) -> None:
    def worker(name: str):
        return next(model.workers[0] for model in server.index().models if model.name == name)

    one, other = Replicas(connect(torchserve), NAMES), Replicas(connect(torchserve), NAMES)
    one.settle()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(lambda: [one.call(UNetForward(), inputs(4, 64)) for _ in range(3)])
        until(lambda: worker(one.current).busy)
        other.settle()
        assert not run.done()
    assert {one.current, other.current} == set(NAMES)

    step, expected = inputs(1, 16), None
    for _ in range(3):
        expected = other.call(UNetForward(), step)[1]["out"]
    until(lambda: worker(other.current).requests == 3 and not worker(other.current).busy)
    before = other.current
    for _ in range(5):
        other.settle()
    assert other.current == before

    server.unregister(before)
    assert torch.equal(other.call(UNetForward(), step)[1]["out"], expected)
    assert other.current == one.current
    server.unregister(one.current)
    with pytest.raises(NotFound, match=r"twice\.unet"):
        other.call(UNetForward(), step)
