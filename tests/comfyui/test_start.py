"""ComfyUI starts, shows its page and takes workflows at once, whatever the server does and the settings say."""

import socket
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.comfyui.comfyui import ComfyUI, Graph, RunFailed
from tests.comfyui.workflows import gateway, remote

pytestmark = pytest.mark.slow

NODES = {
    "LunaConfigGateway",
    "LunaFirstBlockCache",
    "LunaLoRAStack",
    "LunaModelRouter",
    "LunaMultiSaver",
    "LunaQueueStatus",
    "LunaServerStatus",
    "LunaSharedCLIPEncode",
    "LunaSharedCLIPEncodeDual",
    "LunaSharedCLIPEncodeSDXL",
    "LunaSharedVAEDecode",
    "LunaSharedVAEEncode",
}


@pytest.fixture(scope="module")
def hung() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module", params=["nonsense", "hung"])
def comfyui(request, hung: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A ComfyUI without a server that answers."""
    address = {"nonsense": "http//[the server", "hung": hung}[request.param]
    names = ("LUNA_INFERENCE", "LUNA_MANAGEMENT", "LUNA_METRICS")
    base = tmp_path_factory.mktemp("start")
    with ComfyUI(base, base, dict.fromkeys(names, address) | {"LUNA_TOKEN_FILE": "?<>"}) as instance:
        yield instance


def _timed(ask, *arguments: Any) -> tuple[Any, float]:
    started = time.monotonic()
    return ask(*arguments), time.monotonic() - started


def test_all_nodes_are_there_and_asking_for_them_does_not_hold_up_the_page(comfyui: ComfyUI) -> None:
    assert NODES - comfyui.get("/object_info").keys() == set()
    with ThreadPoolExecutor() as pool:
        lists = {
            node: pool.submit(_timed, comfyui.get, f"/object_info/{node}")
            for node in ("LunaModelRouter", "LunaLoRAStack", "LunaSharedVAEDecode")
        }
        panel = pool.submit(_timed, comfyui.get, "/luna/status")
        for _ in range(10):
            time.sleep(0.1)
            assert _timed(comfyui.get, "/system_stats")[1] < 1
        for node, asked in lists.items():
            shown, seconds = asked.result()
            assert shown[node]["input"]["required"] and seconds < 5
        with pytest.raises(urllib.error.HTTPError):
            panel.result()


def test_a_workflow_is_taken_at_once_and_fails_by_name_or_by_cancel(comfyui: ComfyUI, hung: str) -> None:
    g = Graph()
    g.save(gateway(g, *remote(g, "sd15.safetensors"), "a fox <lora:a:0.7>")[5], "never")
    prompt, seconds = _timed(comfyui.start, g)
    assert seconds < 1
    time.sleep(3)
    comfyui.post("/interrupt")
    with pytest.raises(RunFailed) as failure:
        comfyui.wait(prompt, 15)  # before a node runs, ComfyUI waits for what it asks
    if failure.value.kind != "interrupted":
        assert "http//[the server" in failure.value.message and failure.value.node == "LunaModelRouter"
