"""One real TorchServe for all tests that need a server."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luna_client.manager import Timeouts
from luna_client.server import Server
from serving.archives import pack_checkpoint, pack_repository
from serving.torchserve import Ports, TorchServe
from tests.checkpoints import write


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's LunaServe home: models/checkpoints, model_store, run, output and so on lie under it."""
    for name in [name for name in os.environ if name.startswith("LUNA_")]:
        del os.environ[name]
    # One core per worker: the tests share the machine with the workers.
    os.environ["OMP_NUM_THREADS"] = "1"
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def torchserve(home: Path) -> Iterator[TorchServe]:
    """A running TorchServe; of models it has `repository` only."""
    pack_repository(home / "model_store", home)
    with TorchServe(home / "model_store", home / "run", Ports.free()) as running:
        server = connect(running)
        server.register("repository.mar")
        server.wait_ready(["repository"])
        yield running


@pytest.fixture(scope="session")
def server(torchserve: TorchServe) -> Server:
    return connect(torchserve)


@pytest.fixture(scope="session")
def serve(home: Path, server: Server) -> Callable[..., list[str]]:
    """serve(file, roles, name, dtype) packs a checkpoint, has these roles of it loaded, returns the models' names."""

    def serve(file: Path, roles: tuple[str, ...] = ("unet", "clip", "vae"), name=None, dtype="fp32") -> list[str]:
        archives = pack_checkpoint(file, home / "model_store", name, dtype, home)
        models = [archive.model for archive in archives if archive.model.split(".")[-1] in roles]
        for model in models:
            server.register(f"{model}.mar")
        server.wait_ready(models)
        return models

    return serve


@pytest.fixture(scope="session")
def served_tiny(home: Path, serve: Callable[..., list[str]]) -> str:
    """The name of a served tiny SD1.5 checkpoint of random weights, in fp32: tiny.unet, tiny.clip and tiny.vae."""
    serve(write(home / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15"))
    return "tiny"


def connect(torchserve: TorchServe, doors: bool = True, **timeouts: float) -> Server:
    limits = Timeouts(**timeouts)
    return Server(torchserve.inference, torchserve.management, torchserve.key_file, limits, doors=doors)
