"""What a user reads when something is not there, and how soon a cancelled run ends."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from luna_protocol import PROTOCOL_VERSION
from serving.torchserve import Ports, TorchServe
from tests.comfyui.comfyui import ROOT, ComfyUI, Graph, RunFailed
from tests.comfyui.workflows import empty, encode, gateway, local, remote, sample
from tests.conftest import connect

pytestmark = pytest.mark.slow


def _picture(g: Graph, checkpoint: str = "sd15.safetensors", steps: int = 2, side: int = 96, **changes: str):
    same = dict.fromkeys(("unet", "clip", "vae"), "from checkpoint") | {"daemon_mode": "force_daemon"}
    router = g("LunaModelRouter", checkpoint=checkpoint, **(same | changes))
    g.save(sample(g, router[0], encode(g, router[1]), empty(g, side, side), steps=steps), "latent")
    return router


def test_interrupt_ends_a_run_within_0_3_seconds(comfyui: ComfyUI) -> None:
    g = Graph()
    _picture(g, steps=500, side=256)  # steps long enough to be ended halfway
    prompt = comfyui.start(g)
    comfyui.wait_for_step()
    pressed = time.time()
    comfyui.post("/interrupt")
    with pytest.raises(RunFailed, match="interrupted"):
        comfyui.wait(prompt)
    events = dict(comfyui.get(f"/history/{prompt}")[prompt]["status"]["messages"])
    assert events["execution_interrupted"]["timestamp"] / 1000 - pressed < 0.3


def test_a_worker_killed_in_a_run_is_not_noticed(comfyui: ComfyUI, torchserve: TorchServe) -> None:
    reference, g = Graph(), Graph()
    _picture(reference, steps=20)
    _picture(g, steps=20, unet="sd15.safetensors")  # the same, and to ComfyUI another graph, which it has to run
    expected = comfyui.run(reference).latents["latent"]
    worker = psutil.Process(_worker_pid(torchserve, "sd15.unet"))
    prompt = comfyui.start(g)
    comfyui.wait_for_step()
    worker.kill()
    assert (comfyui.wait(prompt).latents["latent"] == expected).all()


def test_an_unknown_lora_is_told_with_those_there_are(comfyui: ComfyUI) -> None:
    g = Graph()
    model, clip, vae = remote(g, "sd15.safetensors")
    out = gateway(g, model, clip, vae, "a fox <lora:inc:0.8>")
    g.save(sample(g, out[0], (out[3], out[4]), out[5]), "never")
    with pytest.raises(RunFailed, match=r"there is no LoRA 'inc'.*on_server.safetensors.*a.safetensors"):
        comfyui.run(g)


def test_a_model_the_server_lacks_is_told_with_those_it_has(comfyui: ComfyUI) -> None:
    g = Graph()
    _picture(g, checkpoint="other.safetensors")
    told = r"no unet of 'other.safetensors' \(SD1.5 and SDXL can be served; it has: .*sd15.safetensors"
    with pytest.raises(RunFailed, match=told):
        comfyui.run(g)


@pytest.fixture(scope="module")
def stray(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A ComfyUI that learns from its settings dialog alone where the server is."""
    with ComfyUI(tmp_path_factory.mktemp("stray"), models, {"OMP_NUM_THREADS": "1"}) as instance:
        yield instance


def _point(comfyui: ComfyUI, inference: str, management: str, key_file: Path) -> None:
    """What the settings dialog does."""
    settings = {"Inference": inference, "Management": management, "TokenFile": str(key_file)}
    comfyui.post("/settings", {f"Luna.Server.{name}": value for name, value in settings.items()})


def test_a_server_that_is_away(stray: ComfyUI, torchserve: TorchServe) -> None:
    _point(stray, "http://127.0.0.1:9", "http://127.0.0.1:9", torchserve.key_file)
    g = Graph()
    _picture(g)
    with pytest.raises(RunFailed, match=r"no server at http://127.0.0.1:9.*start it with scripts/serve.py"):
        stray.run(g)
    reference, fallen_back = Graph(), Graph()
    model, clip, _ = local(reference, "sd15.safetensors")
    reference.save(sample(reference, model, encode(reference, clip), empty(reference, 96, 96), steps=2), "latent")
    router = _picture(fallen_back, daemon_mode="auto")
    fallen_back("PreviewAny", source=router[3])
    run = stray.run(fallen_back)
    assert (run.latents["latent"] == stray.run(reference).latents["latent"]).all()
    told = " ".join(str(output.get("text")) for output in run.history["outputs"].values())
    assert "local, because no server at http://127.0.0.1:9" in told
    assert "Luna Model Router runs locally" in stray.log.read_text()


def test_a_wrong_token(stray: ComfyUI, torchserve: TorchServe, tmp_path: Path) -> None:
    keys = tmp_path / "key_file.json"
    keys.write_text(
        '{"inference": {"key": "wrong", "expiration time": "2099-01-01T00:00:00.000000000Z"},'
        ' "management": {"key": "wrong", "expiration time": "2099-01-01T00:00:00.000000000Z"}, "API": {"key": "wrong"}}'
    )
    _point(stray, torchserve.inference, torchserve.management, keys)
    g = Graph()
    _picture(g)
    with pytest.raises(RunFailed, match=r"refuses the .* token of .*key_file.json"):
        stray.run(g)


def test_a_server_killed_in_a_run_is_told_and_its_return_is_not_noticed(stray, torchserve, tmp_path) -> None:
    ports = Ports.free()

    def start() -> TorchServe:
        running = TorchServe(torchserve.store, tmp_path / "run", ports)
        running.start()
        server = connect(running)
        server.load("repository")
        server.wait_ready(["repository"])
        return running

    running = start()
    try:
        _point(stray, running.inference, running.management, running.key_file)
        g = Graph()
        _picture(g, steps=20)
        prompt = stray.start(g)
        stray.wait_for_step()
        psutil.Process(_worker_pid(running, "repository")).parent().kill()
        killed = time.monotonic()
        with pytest.raises(RunFailed, match=rf"no server at {running.inference}.*start it with scripts/serve.py"):
            stray.wait(prompt)
        assert time.monotonic() - killed < 15  # not after a minute of patience
        running.stop()
        running = start()  # with its models to be loaded again
        assert stray.run(g).latents["latent"].isfinite().all()
    finally:
        running.stop()


def test_a_client_of_another_protocol_version(models: Path, luna: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    for package in ("comfy_client", "luna_client", "luna_protocol", "luna_pictures"):
        shutil.copytree(ROOT / package, other / package)
    shutil.copy(ROOT / "__init__.py", other)
    version = other / "luna_protocol" / "__init__.py"
    ours, other_version = f"PROTOCOL_VERSION = {PROTOCOL_VERSION}", PROTOCOL_VERSION + 1
    assert ours in version.read_text()
    version.write_text(version.read_text().replace(ours, f"PROTOCOL_VERSION = {other_version}"))
    with ComfyUI(tmp_path / "stray", models, luna, other) as comfyui:
        g = Graph()
        _picture(g)
        told = rf"speaks protocol version {other_version}, this server {PROTOCOL_VERSION} \(update LunaServe"
        with pytest.raises(RunFailed, match=told):
            comfyui.run(g)


def _worker_pid(torchserve: TorchServe, name: str) -> int:
    [model] = (model for model in connect(torchserve).index().models if model.name == name)
    return model.workers[0].pid
