"""A ComfyUI whose environment names a server that hangs, and addresses that are none, has all nodes, and cancel ends
their wait. test_hung_server.py has the rest, for a server that is named while ComfyUI runs."""

import socket
import time
from collections.abc import Iterator

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
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    base = tmp_path_factory.mktemp("start")
    nonsense = dict.fromkeys(("LUNA_MANAGEMENT", "LUNA_METRICS"), "http//[the server") | {"LUNA_TOKEN_FILE": "?<>"}
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        hung = {"LUNA_INFERENCE": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        with ComfyUI(base, base, nonsense | hung) as instance:
            yield instance


def test_all_nodes_are_there_and_the_page_answers(comfyui: ComfyUI) -> None:
    assert NODES - comfyui.get("/object_info").keys() == set()
    asked = time.monotonic()
    comfyui.get("/system_stats")
    assert time.monotonic() - asked < 1


def test_a_workflow_is_taken_at_once_and_cancel_ends_its_waiting(comfyui: ComfyUI) -> None:
    g = Graph()
    g.save(gateway(g, *remote(g, "sd15.safetensors"), "a fox <lora:a:0.7>")[5], "never")
    asked = time.monotonic()
    prompt = comfyui.start(g)
    assert time.monotonic() - asked < 1
    time.sleep(1)
    comfyui.post("/interrupt")
    with pytest.raises(RunFailed, match="interrupted"):
        comfyui.wait(prompt, 15)  # one look of ten seconds, whichever nodes have to be looked up
