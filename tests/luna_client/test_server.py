import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch

from luna_client.faults import Unauthorized, Unreachable
from luna_client.manager import Timeouts
from luna_client.server import Server
from luna_client.transport import Transport
from luna_protocol import BLOB, shared_memory
from luna_protocol.blob import content_hash, pack
from luna_protocol.errors import Impossible, Internal, Malformed, NotFound, TooLarge, Unavailable
from luna_protocol.messages import ClipText, UNetForward, UNetOutput, VaeDecode
from serving.torchserve import ROOT, Ports, TorchServe
from tests.conftest import connect


def latent_inputs(rows: int = 1, size: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(rows, 4, size, size, generator=generator),
        "timesteps": torch.full((rows,), 500.0),
        "context": torch.randn(rows, 77, 64, generator=generator),
    }


def test_importing_the_client_needs_neither_side() -> None:
    code = "import sys, luna_client.server; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"ts", "diffusers", "transformers", "comfy", "engine", "handlers", "serving"} & set(loaded.split())


def test_who_operates_a_server_does_not_wait_for_torch() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='it'); print(*sys.modules)"
    for script in ("serve", "models", "monitor", "add_checkpoint"):
        command = [sys.executable, "-c", code, f"scripts/{script}.py"]
        environment = os.environ | {"PYTHONPATH": "scripts"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert "luna_client.manager" in done.stdout.split() and "torch" not in done.stdout.split()


def test_index_and_models_tell_what_is_loaded_where(server: Server, served_tiny: str) -> None:
    found = {model.name: model for model in server.index().models}
    for role in ("unet", "clip", "vae"):
        model = found[f"{served_tiny}.{role}"]
        assert (model.role, model.family) == (role, "sd15")
        assert [worker.state for worker in model.workers] == ["ready"]
    assert {f"{served_tiny}.unet", "repository"} <= set(server.models())
    assert server.describe(f"{served_tiny}.unet")["batchSize"] == 4


def test_threads_share_a_server(server: Server, served_tiny: str) -> None:
    inputs = latent_inputs()
    alone = server.call(f"{served_tiny}.unet", UNetForward(), inputs)[1]["out"]
    with ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(server.call, f"{served_tiny}.unet", UNetForward(), inputs) for _ in range(24)]
        for call in calls:
            assert torch.allclose(call.result()[1]["out"], alone, atol=1e-5)


def test_tensors_go_by_hash_until_the_worker_lacks_them(server: Server, served_tiny: str, monkeypatch) -> None:
    inputs = latent_inputs()
    plain = server.call(f"{served_tiny}.unet", UNetForward(), inputs)[1]["out"]
    request = UNetForward(references={"context": content_hash(inputs["context"])})
    bodies = []
    predict = server._predict
    monkeypatch.setattr(
        server, "_predict", lambda model, body: (bodies.append(body.blob_bytes), predict(model, body))[1]
    )
    first = server.call(f"{served_tiny}.unet", request, inputs)[1]["out"]
    assert len(bodies) == 2 and bodies[1] - bodies[0] >= inputs["context"].nbytes
    again = server.call(f"{served_tiny}.unet", request, inputs)[1]["out"]
    assert len(bodies) == 3 and bodies[2] == bodies[0]
    assert torch.equal(first, plain) and torch.equal(again, plain)


def test_shared_memory_and_bodies_give_the_same(server: Server, torchserve: TorchServe, served_tiny: str) -> None:
    inputs = latent_inputs(2, 24)
    from_elsewhere = connect(torchserve)
    from_elsewhere._transport = Transport("http://elsewhere")
    by_body = from_elsewhere.call(f"{served_tiny}.unet", UNetForward(), inputs)[1]["out"]
    leases = server._transport._leases
    assert leases is not None
    for _ in range(2):
        assert torch.equal(server.call(f"{served_tiny}.unet", UNetForward(), inputs)[1]["out"], by_body)
    assert server._transport._leases is leases and len(leases._idle) > 0


def test_a_worker_that_cannot_reach_our_memory_gets_bodies(
    torchserve: TorchServe, served_tiny, monkeypatch, tmp_path, caplog
):
    client, inputs = connect(torchserve), latent_inputs()
    model = f"{served_tiny}.unet"
    expected = client.call(model, UNetForward(), inputs)[1]["out"]
    # A folder that the worker does not look into, as if it ran in a container.
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    apart = connect(torchserve)
    for _ in range(2):
        assert torch.equal(apart.call(model, UNetForward(), inputs)[1]["out"], expected)
    assert caplog.text.count("cannot map our memory") == 1


def test_a_hash_that_nobody_holds_is_told(server: Server, served_tiny: str) -> None:
    inputs = latent_inputs()
    del inputs["context"]
    with pytest.raises(Exception, match="asks for tensors"):
        server.call(f"{served_tiny}.unet", UNetForward(references={"context": "0" * 32}), inputs)


def test_faults_of_the_handlers_come_back_as_they_were_raised(server: Server, served_tiny: str) -> None:
    inputs = latent_inputs()
    with pytest.raises(Impossible, match="finite"):
        server.call(f"{served_tiny}.unet", UNetForward(), inputs | {"timesteps": torch.tensor([float("nan")])})
    with pytest.raises(Malformed, match="context"):
        server.call(f"{served_tiny}.unet", UNetForward(), {"x": inputs["x"], "timesteps": inputs["timesteps"]})
    with pytest.raises(Malformed, match="vae_decode"):
        server.call(f"{served_tiny}.unet", VaeDecode(), {"latent": inputs["x"]})
    assert server.call(f"{served_tiny}.unet", UNetForward(), inputs)[1]["out"].isfinite().all()


def test_faults_of_torchserve_are_told_as_ours(server: Server, torchserve: TorchServe, served_tiny: str) -> None:
    with pytest.raises(NotFound, match=r"absent\.unet"):
        server.call("absent.unet", UNetForward(), {})
    with pytest.raises(NotFound, match=r"absent\.mar"):
        server.register("absent.mar")
    with pytest.raises(NotFound, match="absent"):
        server.unregister("absent.unet")
    assert server.ping()


def test_a_body_over_the_limit_is_refused_with_the_setting_to_change(torchserve: TorchServe, served_tiny: str) -> None:
    over_http = Server(torchserve.inference, torchserve.management, torchserve.key_file, doors=False)
    over_http._transport = Transport("http://elsewhere")
    with pytest.raises(TooLarge, match="max_request_size"):
        over_http.call(f"{served_tiny}.vae", VaeDecode(), {"latent": torch.zeros(1, 4, 1024, 1024 * 16)})
    assert over_http.ping()


def test_a_model_without_workers_is_unavailable_and_comes_back(server: Server, torchserve, served_tiny: str) -> None:
    model = f"{served_tiny}.clip"
    impatient = connect(torchserve, patience=1)
    server.scale(model, 0)
    try:
        with pytest.raises(Unavailable, match="no worker"):
            while True:  # until the last worker is gone
                impatient.call(model, ClipText(texts=["x"]))
    finally:
        server.scale(model, 1)
    seen = []
    server.wait_ready([model], progress=lambda *state: seen.append(state))
    assert seen[-1] == (model, 1, 1)
    assert server.call(model, ClipText(texts=["x"]))[1]["hidden"].shape == (1, 77, 64)


@pytest.mark.slow
def test_a_request_outlives_its_worker(server: Server, served_tiny: str) -> None:
    model = f"{served_tiny}.vae"
    latent = torch.randn(1, 4, 96, 96, generator=torch.Generator().manual_seed(5))
    expected = server.call(model, VaeDecode(), {"latent": latent})[1]["pixels"]
    [worker] = server.describe(model)["workers"]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(server.call, model, VaeDecode(), {"latent": latent})
        time.sleep(0.3)
        psutil.Process(worker["pid"]).kill()
        assert torch.equal(call.result()[1]["pixels"], expected)
    assert server.describe(model)["workers"][0]["pid"] != worker["pid"]


# Tokens


def test_without_a_token_or_with_a_wrong_one_the_message_names_the_file(torchserve: TorchServe, tmp_path: Path) -> None:
    addresses = torchserve.inference, torchserve.management
    with pytest.raises(Unauthorized, match=r"nowhere\.json"):
        Server(*addresses, tmp_path / "nowhere.json").index()
    wrong = json.loads(torchserve.key_file.read_text())
    for kind in wrong.values():
        kind["key"] = "x" * 8
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(Unauthorized, match=r"wrong\.json"):
        Server(*addresses, tmp_path / "wrong.json").index()
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(Unauthorized, match="not TorchServe's key file"):
        Server(*addresses, tmp_path / "broken.json").index()


def test_the_key_file_is_found_by_its_variable_or_by_the_servers(torchserve: TorchServe, home, monkeypatch) -> None:
    variables = {"LUNA_TOKEN_FILE": torchserve.key_file, "LUNA_RUN": torchserve.run, "LUNA_HOME": home}
    for name, value in variables.items():
        with monkeypatch.context() as only:
            only.setenv(name, str(value))
            assert Server(torchserve.inference, torchserve.management).models()


def test_the_key_file_is_for_its_owner_only(torchserve: TorchServe) -> None:
    if os.name == "posix":
        assert torchserve.key_file.stat().st_mode & 0o077 == 0


def test_tokens_are_renewed_before_they_expire_and_after_others_renewed_them(tmp_path: Path) -> None:
    # Tokens of 63 s are due for renewal, at 60 s before their end, after 3 s.
    with TorchServe(tmp_path / "store", tmp_path / "run", Ports.free(), token_expiration_min="1.05") as torchserve:
        first, second = connect(torchserve), connect(torchserve)
        assert first.models() == second.models() == []
        original = torchserve.key_file.read_text()
        time.sleep(4)
        assert first.models() == []
        assert torchserve.key_file.read_text() != original
        assert second.models() == []  # its token was void by then
        stale = tmp_path / "stale.json"
        stale.write_text(torchserve.key_file.read_text())
        first._renew("management", json.loads(original)["API"]["key"])
        with pytest.raises(Unauthorized):
            Server(torchserve.inference, torchserve.management, stale).models()
        assert first.models() == second.models() == []


# A server that misbehaves in ways that a real one cannot be made to


@contextmanager
def misbehaving(*answers: tuple[int, dict, bytes] | None) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that gives these answers one after the other, None cutting the connection, and notes the paths."""
    left, paths = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            paths.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = left.pop(0)
            if answer is None:
                self.close_connection = True
                return
            status, headers, body = answer
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_DELETE = do_POST

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        server.server_close()


OUT = (200, {"Content-Type": BLOB}, pack(UNetOutput(), {"out": torch.ones(1)}))
BUSY = (503, {"Retry-After": "1"}, Unavailable("full", retry_after=1).to_json())


def test_a_full_server_is_asked_again_when_it_says(tmp_path: Path) -> None:
    with misbehaving(BUSY, OUT) as (address, paths):
        begun = time.monotonic()
        assert (
            Server(address, address, tmp_path / "none", doors=False).call("m", UNetForward(), {})[1]["out"].item() == 1
        )
        assert len(paths) == 2 and time.monotonic() - begun >= 1


def test_a_dead_worker_behind_a_proxy_without_management_is_waited_for(tmp_path: Path) -> None:
    died, starting = (507, {}, b'{"message": "Worker died."}'), (503, {}, b'{"message": "no worker"}')
    with misbehaving(died, starting, OUT) as (address, paths):
        server = Server(address, f"http://127.0.0.1:{Ports.free().management}", tmp_path / "none", doors=False)
        assert server.call("m", UNetForward(), {})[1]["out"].item() == 1
        assert paths == ["/predictions/m"] * 3


def test_patience_ends(tmp_path: Path) -> None:
    with misbehaving(BUSY, BUSY) as (address, paths):
        with pytest.raises(Unavailable, match="full"):
            Server(address, address, tmp_path / "none", Timeouts(patience=1.5), doors=False).call(
                "m", UNetForward(), {}
            )
        assert len(paths) == 2


def test_a_cut_connection_is_tried_again_for_what_may_run_twice(tmp_path: Path) -> None:
    with misbehaving(None, None, OUT) as (address, paths):
        Server(address, address, tmp_path / "none", doors=False).call("m", UNetForward(), {})
        assert len(paths) == 3
    with misbehaving(None, OUT) as (address, paths):
        with pytest.raises(Unreachable, match="breaks off"):
            Server(address, address, tmp_path / "none", doors=False).unregister("m")
        assert len(paths) == 1


def test_answers_that_are_not_ours_are_told(tmp_path: Path) -> None:
    with misbehaving((200, {"Content-Type": "text/html"}, b"<html>"), (500, {}, b"<html>")) as (address, _):
        server = Server(address, address, tmp_path / "none", doors=False)
        with pytest.raises(Internal, match="html"):
            server.call("m", UNetForward(), {})
        with pytest.raises(Exception, match="500"):
            server.call("m", UNetForward(), {})


def test_a_silent_server_times_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Unavailable, match="within 1 s"):
            Server(address, address, tmp_path / "none", Timeouts(answer=1), doors=False).call("m", UNetForward(), {})


def test_no_server_is_unreachable_at_once(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{Ports.free().inference}"
    server = Server(address, address, tmp_path / "none", doors=False)
    assert not server.ping()
    begun = time.monotonic()
    with pytest.raises(Unreachable, match=r"scripts/serve\.py"):
        server.call("m", UNetForward(), {})
    assert time.monotonic() - begun < 5
