"""What a user reads when something is not there, and how soon a cancelled run ends."""

import contextlib
import shutil
import time
from pathlib import Path

import psutil
import pytest

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


@pytest.fixture
def stray(models, luna, tmp_path):
    """A ComfyUI whose settings about the server can be spoiled."""

    @contextlib.contextmanager
    def start(nodes: Path = ROOT, **changes: str):
        with ComfyUI(tmp_path / "stray", models, luna | changes, nodes) as instance:
            yield instance

    return start


def test_a_server_that_is_away(stray) -> None:
    with stray(LUNA_INFERENCE="http://127.0.0.1:9", LUNA_MANAGEMENT="http://127.0.0.1:9") as comfyui:
        g = Graph()
        _picture(g)
        with pytest.raises(RunFailed, match=r"no server at http://127.0.0.1:9.*start it with scripts/serve.py"):
            comfyui.run(g)
        reference, fallen_back = Graph(), Graph()
        model, clip, _ = local(reference, "sd15.safetensors")
        reference.save(sample(reference, model, encode(reference, clip), empty(reference, 96, 96), steps=2), "latent")
        router = _picture(fallen_back, daemon_mode="auto")
        fallen_back("PreviewAny", source=router[3])
        run = comfyui.run(fallen_back)
        assert (run.latents["latent"] == comfyui.run(reference).latents["latent"]).all()
        told = " ".join(str(output.get("text")) for output in run.history["outputs"].values())
        assert "local, because no server at http://127.0.0.1:9" in told
        assert "Luna Model Router runs locally" in comfyui.log.read_text()


def test_a_server_killed_in_a_run_is_told_and_its_return_is_not_noticed(stray, torchserve, tmp_path) -> None:
    ports = Ports.free()

    def start() -> TorchServe:
        running = TorchServe(torchserve.store, tmp_path / "run", ports)
        running.start()
        server = connect(running)
        for model in ("repository", "sd15.unet", "sd15.clip", "sd15.vae"):
            server.load(model)
            server.wait_ready([model])
        return running

    running = start()
    try:
        addresses = {"LUNA_INFERENCE": running.inference, "LUNA_MANAGEMENT": running.management}
        with stray(**addresses, LUNA_TOKEN_FILE=str(running.key_file)) as comfyui:
            g = Graph()
            _picture(g, steps=20)
            prompt = comfyui.start(g)
            comfyui.wait_for_step()
            psutil.Process(_worker_pid(running, "repository")).parent().kill()
            killed = time.monotonic()
            with pytest.raises(RunFailed, match=rf"no server at {running.inference}.*start it with scripts/serve.py"):
                comfyui.wait(prompt)
            assert time.monotonic() - killed < 5
            running.stop()
            running = start()
            assert comfyui.run(g).latents["latent"].isfinite().all()
    finally:
        running.stop()


def test_a_client_of_another_protocol_version(stray, tmp_path) -> None:
    other = tmp_path / "other"
    for package in ("comfy_client", "luna_protocol", "luna_pictures"):
        shutil.copytree(ROOT / package, other / package)
    shutil.copy(ROOT / "__init__.py", other)
    version = other / "luna_protocol" / "__init__.py"
    version.write_text(version.read_text().replace("PROTOCOL_VERSION = 1", "PROTOCOL_VERSION = 2"))
    with stray(nodes=other) as comfyui:
        g = Graph()
        _picture(g)
        told = r"the client speaks protocol version 2, this server 1 \(update LunaServe on the older side\)"
        with pytest.raises(RunFailed, match=told):
            comfyui.run(g)


def test_a_wrong_token(stray, tmp_path) -> None:
    keys = tmp_path / "key_file.json"
    keys.write_text(
        '{"inference": {"key": "wrong", "expiration time": "2099-01-01T00:00:00.000000000Z"},'
        ' "management": {"key": "wrong", "expiration time": "2099-01-01T00:00:00.000000000Z"}, "API": {"key": "wrong"}}'
    )
    with stray(LUNA_TOKEN_FILE=str(keys)) as comfyui:
        g = Graph()
        _picture(g)
        with pytest.raises(RunFailed, match=r"refuses the .* token of .*key_file.json"):
            comfyui.run(g)


def _worker_pid(torchserve: TorchServe, name: str) -> int:
    [model] = (model for model in connect(torchserve).index().models if model.name == name)
    return model.workers[0].pid
