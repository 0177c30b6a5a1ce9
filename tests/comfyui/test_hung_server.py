"""A server that hangs, and addresses that are none, cost a ComfyUI neither its nodes nor its pages."""

import json
import socket
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfyui.comfyui import ComfyUI, Graph, RunFailed

pytestmark = pytest.mark.slow


@pytest.fixture
def silent() -> Iterator[str]:
    """The address, without http://, of what takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def comfyui(models_folder, tmp_path_factory) -> Iterator[ComfyUI]:
    """A ComfyUI without models, to which only its settings dialog says where the server is."""
    environment = dict.fromkeys(("LUNA_INFERENCE", "LUNA_MANAGEMENT", "LUNA_METRICS"), "")
    with ComfyUI(tmp_path_factory.mktemp("away"), models_folder, environment) as running:
        yield running


@pytest.fixture
def away(comfyui: ComfyUI, silent: str) -> ComfyUI:
    set_in_dialog(comfyui, Inference=silent, Management=silent, Metrics=silent)
    return comfyui


def set_in_dialog(comfyui: ComfyUI, **addresses: str) -> None:
    file = comfyui.base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({f"Luna.Server.{name}": address for name, address in addresses.items()}))


def test_pages_are_answered_while_the_lists_are_looked_up(away: ComfyUI) -> None:
    opened: list[float] = []

    def open_page() -> None:
        begun = time.monotonic()
        assert "LunaModelRouter" in away.get("/object_info")
        opened.append(time.monotonic() - begun)

    pages = [threading.Thread(target=open_page) for _ in range(3)]
    for page in pages:
        page.start()
    slowest, begun = 0.0, time.monotonic()
    while any(page.is_alive() for page in pages):
        assert time.monotonic() - begun < 60
        asked = time.monotonic()
        away.get("/queue")
        slowest = max(slowest, time.monotonic() - asked)
        time.sleep(0.02)
    assert len(opened) == 3 and max(opened) < 20  # two seconds of patience, and what ComfyUI itself takes
    assert slowest < 8  # what collecting the lists takes it, on a busy machine


def test_a_run_and_the_panel_say_so_in_a_sentence(away: ComfyUI, silent: str) -> None:
    g = Graph()
    same = dict.fromkeys(("unet", "clip", "vae"), "from checkpoint")
    router = g("LunaModelRouter", checkpoint="sd15.safetensors", daemon_mode="force_daemon", **same)
    g("PreviewAny", source=router[3])
    prompt = away.start(g)
    with pytest.raises(urllib.error.HTTPError) as refused:
        away.get("/luna/status")
    assert f"http://{silent} did not answer within 10 s" in json.load(refused.value)["message"]
    with pytest.raises(RunFailed, match=rf"http://{silent} did not answer within 10 s"):
        away.wait(prompt)


def test_addresses_that_are_none_leave_the_nodes_and_are_named(comfyui: ComfyUI) -> None:
    for address in ("two words", "127.0.0.1:port", "::1", "http://["):
        set_in_dialog(comfyui, Inference=address, Management=address, Metrics=address)
        assert "LunaModelRouter" in comfyui.get("/object_info/LunaModelRouter")
        with pytest.raises(urllib.error.HTTPError) as refused:
            comfyui.get("/luna/status")
        assert "is no address of a server" in json.load(refused.value)["message"]
    g = Graph()
    status = g("LunaServerStatus")
    g("PreviewAny", source=status[0])
    outputs = comfyui.run(g).history["outputs"]
    assert "is no address of a server" in " ".join(str(output.get("text")) for output in outputs.values())


def test_settings_that_are_none_leave_the_nodes(comfyui: ComfyUI) -> None:
    (comfyui.base / "user" / "default" / "comfy.settings.json").write_text("[]")
    assert "LunaModelRouter" in comfyui.get("/object_info/LunaModelRouter")


def test_comfyui_itself_finds_what_a_workflow_from_windows_names(comfyui: ComfyUI, models_folder: Path) -> None:
    (models_folder / "checkpoints" / "SDXL").mkdir(parents=True)
    (models_folder / "checkpoints" / "SDXL" / "x.safetensors").write_bytes(b"nothing that could be loaded")
    g = Graph()
    same = dict.fromkeys(("unet", "clip", "vae"), "from checkpoint")
    router = g("LunaModelRouter", checkpoint="SDXL\\x.safetensors", daemon_mode="force_local", **same)
    g("PreviewAny", source=router[3])
    with pytest.raises(RunFailed) as failed:
        comfyui.run(g)
    assert failed.value.kind != "luna_protocol.errors.NotFound"
    assert "header" in failed.value.message.lower()  # it was opened
