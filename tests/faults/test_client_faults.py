"""What clients do wrong, too much of, or too slowly is told to them and to nobody else."""

import json
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import urllib3

from luna_client.faults import Unreachable
from luna_client.server import Server
from luna_protocol.errors import Broken, Full, LunaError, NotFound, TooLarge, Unavailable
from luna_protocol.messages import UNetForward, VaeDecode
from serving.torchserve import TorchServe
from tests.checkpoints import write
from tests.conftest import connect

pytestmark = pytest.mark.slow
TENSORS = {"x": torch.ones(1, 4, 8, 8), "timesteps": torch.ones(1), "context": torch.ones(1, 77, 64)}


def token(torchserve: TorchServe) -> str:
    return json.loads(torchserve.key_file.read_text())["inference"]["key"]


def pid(server: Server, model: str) -> int:
    return server.describe(model)["workers"][0]["pid"]


def test_a_probe_is_a_plain_get(torchserve: TorchServe, served_tiny: str) -> None:
    headers = {"Authorization": f"Bearer {token(torchserve)}"}
    for model in (f"{served_tiny}.unet", f"{served_tiny}.vae", "repository"):
        answer = urllib3.request("GET", f"{torchserve.inference}/predictions/{model}", headers=headers)
        assert (answer.status, json.loads(answer.data)["kind"]) == (200, "ready")


def test_full_broken_absent_and_gone_are_four_things(server, torchserve, served_tiny, serve, home, tmp_path) -> None:
    model = f"{served_tiny}.unet"
    # Full: more requests than TorchServe's queue takes, from clients that do not wait.
    hasty = connect(torchserve, doors=False, patience=0)
    errors: list[LunaError] = []
    work = {"x": torch.ones(1, 4, 32, 32), "timesteps": torch.ones(1), "context": torch.ones(1, 77, 64)}

    def ask() -> None:
        try:
            hasty.call(model, UNetForward(), work)
        except LunaError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(130)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(500)
    assert errors and {type(error) for error in errors} == {Full}
    assert "wait for" in str(errors[0])

    # Broken: a checkpoint that was cut off after it was packed.
    file = write(home / "models" / "checkpoints" / "cut.safetensors", "tiny_sd15")
    whole = file.read_bytes()
    [broken] = serve(file, ("unet",))
    server.unregister(broken)
    file.write_bytes(whole[: len(whole) // 2])
    server.load(broken)
    server.wait_ready([broken])
    with pytest.raises(Broken, match=r"cut\.safetensors"):
        server.call(broken, UNetForward(), TENSORS)
    # Mended, it loads by the same call.
    file.write_bytes(whole)
    server.load(broken)
    server.wait_ready([broken])
    assert server.call(broken, UNetForward(), TENSORS)[1]["out"].shape == (1, 4, 8, 8)
    server.unload(broken)

    # Absent, and no server at all.
    with pytest.raises(NotFound):
        server.call(broken, UNetForward(), TENSORS)
    with pytest.raises(Unreachable):
        Server("http://127.0.0.1:9", "http://127.0.0.1:9", tmp_path / "none").call(model, UNetForward(), TENSORS)
    assert not issubclass(NotFound, Unavailable)


def test_a_client_that_goes_away_costs_its_own_request_alone(server, torchserve, served_tiny) -> None:
    model = f"{served_tiny}.unet"
    before, expected = pid(server, model), server.call(model, UNetForward(), TENSORS)[1]["out"]
    address = urlsplit(torchserve.inference)
    for sent in (b"", b"x" * 10, b"x" * 5000):
        with socket.create_connection((address.hostname, address.port)) as gone:
            head = f"POST /predictions/{model} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token(torchserve)}\r\n"
            gone.sendall(f"{head}Content-Length: 5000\r\n\r\n".encode() + sent)
    assert torch.equal(server.call(model, UNetForward(), TENSORS)[1]["out"], expected)
    assert pid(server, model) == before


def test_slow_clients_keep_nobody_waiting(server, torchserve, served_tiny) -> None:
    model = f"{served_tiny}.unet"
    address = urlsplit(torchserve.inference)
    slow = []
    try:
        for _ in range(40):
            client = socket.create_connection((address.hostname, address.port))
            client.sendall(f"POST /predictions/{model} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\nx".encode())
            slow.append(client)
        begun = time.monotonic()
        server.call(model, UNetForward(), TENSORS)
        alone = time.monotonic() - begun
    finally:
        for client in slow:
            client.close()
    assert alone < 60


def test_too_large_a_request_is_refused_whichever_way_it_comes(server, torchserve, served_tiny) -> None:
    model = f"{served_tiny}.vae"
    before = pid(server, model)
    # By shared memory, where the handler counts pixels before it computes.
    with pytest.raises(TooLarge, match="pixels"):
        server.call(model, VaeDecode(), {"latent": torch.zeros(17, 4, 512, 512)})
    # As a body, which TorchServe does not even read to its end.
    headers = {"Authorization": f"Bearer {token(torchserve)}", "Content-Type": "application/octet-stream"}
    body = bytes(210_000_000)
    answer = urllib3.request("POST", f"{torchserve.inference}/predictions/{model}", body=body, headers=headers)
    assert answer.status == 413
    assert pid(server, model) == before


def test_no_token_is_written_to_any_log(torchserve: TorchServe, server: Server, served_tiny: str) -> None:
    server.call(f"{served_tiny}.unet", UNetForward(), TENSORS)
    keys = [entry["key"] for entry in json.loads(torchserve.key_file.read_text()).values()]
    logs = [path for path in Path(torchserve.log.parent).rglob("*") if path.is_file()]
    assert logs
    for path in logs:
        text = path.read_text(errors="replace")
        assert not any(key in text for key in keys), path
