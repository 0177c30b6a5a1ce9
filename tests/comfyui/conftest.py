"""One real ComfyUI and one real server for all tests here; without COMFYUI_DIR they are skipped."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from serving.archives import pack_checkpoint, pack_repository
from serving.torchserve import Ports, TorchServe
from tests import checkpoints
from tests.comfyui.comfyui import ROOT, ComfyUI
from tests.comfyui.memory import MemoryWatch
from tests.conftest import connect

MEMORY = pytest.StashKey[MemoryWatch]()
MOST_BYTES = 12e9


@pytest.fixture(scope="session", autouse=True)
def _comfyui_is_there() -> None:
    if not os.environ.get("COMFYUI_DIR"):
        pytest.skip("set COMFYUI_DIR to a ComfyUI folder (and COMFYUI_PYTHON to its interpreter)")


@pytest.fixture(scope="session", autouse=True)
def _memory(_comfyui_is_there: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here together fits a machine of 16 GB with room to spare."""
    watch = request.config.stash[MEMORY] = MemoryWatch()
    yield
    watch.stop()
    assert watch.peak < MOST_BYTES, str(watch)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if watch := config.stash.get(MEMORY, None):
        terminalreporter.write_line(f"memory of tests/comfyui: {watch}")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's model folders with seeded checkpoints and everything that patches them."""
    folder = tmp_path_factory.mktemp("models")
    for shape in ("sd15", "sd15_inpaint", "sd15_wide"):
        checkpoints.write(folder / "checkpoints" / f"{shape}.safetensors", shape, torch.float16)
    wide = load_file(folder / "checkpoints" / "sd15.safetensors")
    float8 = {name: each.to(torch.float8_e4m3fn) if each.is_floating_point() else each for name, each in wide.items()}
    save_file(float8, folder / "checkpoints" / "sd15_float8.safetensors")
    checkpoints.write_lora(folder / "loras" / "a.safetensors", "sd15", seed=2)
    checkpoints.write_lora(folder / "loras" / "b.safetensors", "sd15", rank=8, alpha=None, seed=5)
    checkpoints.write_controlnet(folder / "controlnet" / "net.safetensors", "sd15")
    checkpoints.write_embedding(folder / "embeddings" / "thing.safetensors", "sd15")
    (folder / "vae").mkdir()
    return folder


@pytest.fixture(scope="session")
def torchserve(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """A server of these checkpoints, with one thread a worker, as ComfyUI has here; the nodes load what they use."""
    home = tmp_path_factory.mktemp("home")
    store = home / "model_store"
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("LUNA_CHECKPOINTS", str(models / "checkpoints"))
    patch.setenv("LUNA_LORAS", str(home / "loras"))
    (home / "loras").mkdir()
    os.link(models / "loras" / "b.safetensors", home / "loras" / "on_server.safetensors")
    pack_repository(store, home)
    for file in sorted((models / "checkpoints").iterdir()):
        pack_checkpoint(file, store, home=home)
    with TorchServe(store, home / "run", Ports.free()) as running:
        server = connect(running)
        server.register("repository.mar")
        server.wait_ready(["repository"])
        yield running
    patch.undo()


@pytest.fixture(scope="session")
def sdxl(models: Path, torchserve: TorchServe, comfyui: ComfyUI) -> None:
    """sdxl.safetensors, on both sides, and its LoRA; ComfyUI takes text encoders of the full size only."""
    file = models / "checkpoints" / "sdxl.safetensors"
    # In a process of its own: this one would keep the gigabytes.
    command = [sys.executable, "-m", "tests.checkpoints", "sdxl", file, "--dtype", "fp16"]
    subprocess.run(command, cwd=ROOT, check=True)
    checkpoints.write_lora(models / "loras" / "xl.safetensors", "sdxl", seed=7)
    pack_checkpoint(file, torchserve.store, home=torchserve.store.parent)
    _make_room(torchserve, comfyui, "repository")


@pytest.fixture
def room(torchserve: TorchServe, comfyui: ComfyUI) -> Iterator[None]:
    """Afterwards neither side holds a model of which other tests make no use."""
    yield
    _make_room(torchserve, comfyui, "repository", "sd15.")


def _make_room(torchserve: TorchServe, comfyui: ComfyUI, *kept: str) -> None:
    server = connect(torchserve)
    others = [name for name in server.models() if not name.startswith(kept)]
    for name in others:
        server.unload(name)
    if others:
        comfyui.post("/free", {"unload_models": True, "free_memory": True})


@pytest.fixture(scope="session")
def luna(torchserve: TorchServe) -> dict[str, str]:
    """What tells a ComfyUI where the server is."""
    return {
        "LUNA_INFERENCE": torchserve.inference,
        "LUNA_MANAGEMENT": torchserve.management,
        "LUNA_METRICS": torchserve.metrics,
        "LUNA_TOKEN_FILE": str(torchserve.key_file),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def comfyui(models: Path, luna: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A ComfyUI that knows the server, with a picture and a mask to load."""
    base = tmp_path_factory.mktemp("comfyui")
    instance = ComfyUI(base, models, luna)
    pixels = numpy.random.default_rng(0).integers(0, 256, (96, 128, 4), dtype=numpy.uint8)
    pixels[..., 3] = 255
    pixels[24:64, 32:80, 3] = 0
    Image.fromarray(pixels).save(base / "input" / "picture.png")
    with instance:
        yield instance
