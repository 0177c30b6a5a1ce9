"""A model that is being used gives way to a new archive of its name."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luna_client.server import Server
from luna_protocol.errors import LunaError
from luna_protocol.messages import ReplaceModel, UNetForward
from serving.torchserve import TorchServe
from tests.checkpoints import write
from tests.conftest import connect
from tests.scripts.test_commands import add


def write_unet(path: Path, seed: int) -> Path:
    tensors = load_file(write(path, "tiny_sd15", seed=seed))
    save_file({name: each for name, each in tensors.items() if name.startswith("model.diffusion_model.")}, path)
    return path


X = {"x": torch.ones(1, 4, 16, 16), "timesteps": torch.ones(1), "context": torch.ones(1, 77, 64)}


@pytest.mark.slow
def test_six_busy_clients_notice_nothing_but_the_new_weights(torchserve: TorchServe, server: Server, home: Path, serve):
    file = home / "models" / "checkpoints" / "busy.safetensors"
    [model] = serve(write_unet(file, seed=0), ("unet",))
    before = server.call(model, UNetForward(), X)[1]["out"]
    stop = threading.Event()
    outcomes: list[list] = [[] for _ in range(6)]

    def sample(outcome: list) -> None:
        client = connect(torchserve, answer=60, patience=120)
        while not stop.is_set():
            try:
                outcome.append(client.call(model, UNetForward(), X)[1]["out"])
            except LunaError as error:
                outcome.append(error)
                return

    threads = [threading.Thread(target=sample, args=(outcome,)) for outcome in outcomes]
    for thread in threads:
        thread.start()
    write_unet(file.with_suffix(".new"), seed=1).replace(file)
    options = ("--port", str(torchserve.ports.inference), "--store", torchserve.store, "--dtype", "bf16")
    done = add(home, file, *options, LUNA_TOKEN_FILE=str(torchserve.key_file))
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [len(outcome) for outcome in outcomes]
    deadline = time.monotonic() + 60
    while any(len(outcome) < count + 2 for outcome, count in zip(outcomes, counts, strict=True)):
        assert time.monotonic() < deadline, outcomes
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not [each for outcome in outcomes for each in outcome if isinstance(each, LunaError)]
    assert all(outcome[0].dtype == before.dtype and outcome[-1].dtype == torch.bfloat16 for outcome in outcomes)
    assert not any(each.replacing for each in server.index().models)
    server.unregister(model)


def test_a_replacement_that_is_never_finished_ends(served_tiny: str, torchserve, server: Server, home: Path):
    model = f"{served_tiny}.unet"
    server.ask(ReplaceModel(model=model))
    [mark] = (home / "run" / "replaced").iterdir()
    assert [each.name for each in server.index().models if each.replacing] == [model]
    impatient = connect(torchserve, patience=0)
    with pytest.raises(LunaError, match=r"tiny\.unet is being replaced"):
        impatient.call(model, UNetForward(), X)
    os.utime(mark, (time.time() - 200,) * 2)
    assert server.call(model, UNetForward(), X)[1]["out"].shape == X["x"].shape
    server.ask(ReplaceModel(model=model, done=True))
    assert not mark.exists()


def test_only_models_of_the_store_are_replaced(server: Server, home: Path):
    for name in ("absent.unet", "..\\..\\x", "../x"):
        with pytest.raises(LunaError, match="the store has no model"):
            server.ask(ReplaceModel(model=name))
