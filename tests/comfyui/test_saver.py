"""Luna Multi Saver and Luna Queue Status in a real ComfyUI."""

import json
import time
from pathlib import Path

import numpy
import pytest
from PIL import Image

from serving.torchserve import Ports, TorchServe
from tests.comfyui.comfyui import ComfyUI, Graph, Output, RunFailed
from tests.comfyui.workflows import empty, encode, local, remote, sample
from tests.conftest import connect

pytestmark = pytest.mark.slow

CHECKPOINT = "sd15.safetensors"


def saver(g: Graph, vae: Output, **changes) -> Output:
    inputs = {
        "save_path": "luna",
        "filename": "%seed%_%model_name%",
        "save_mode": "daemon",
        "priority": 0,
        "quality_gate": "disabled",
        "min_quality": 0.3,
        "png_compression": 4,
        "lossy_quality": 90,
        "lossless_webp": True,
        "embed_workflow": True,
        "embed_metadata": True,
        "filename_index": 0,
    }
    for slot in range(1, 6):
        inputs |= {f"affix_{slot}": f"S{slot}", f"format_{slot}": "png", f"subdir_{slot}": False}
    return g("LunaMultiSaver", vae=vae, **(inputs | changes))


def pictures(folder: Path, names: list[str], seconds: float = 60) -> list[Path]:
    deadline = time.monotonic() + seconds
    paths = [folder / name for name in names]
    while not all(path.is_file() for path in paths):
        assert time.monotonic() < deadline, f"{names} are not in {list(folder.rglob('*'))}"
        time.sleep(0.1)
    return paths


def promised(run, g: Graph) -> list[str]:
    node = next(name for name, node in g.nodes.items() if node["class_type"] == "LunaMultiSaver")
    return run.history["outputs"][node]["text"]


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as image:
        return numpy.array(image)


@pytest.mark.parametrize("parts", (remote, local), ids=("server", "comfyui"))
def test_pictures_are_those_that_save_image_writes(parts, comfyui: ComfyUI, torchserve: TorchServe) -> None:
    g = Graph()
    model, clip, vae = parts(g, CHECKPOINT)
    latent = sample(g, model, encode(g, clip), empty(g))
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=vae), filename_prefix=f"stock_{parts.__name__}")
    saver(g, vae, latent_1=latent, latent_2=latent, format_2="webp", save_path=parts.__name__)
    run = comfyui.run(g)
    names = promised(run, g)
    assert [Path(name).suffix for name in names] == [".png", ".webp"]
    home = torchserve.store.parent / "output" if parts is remote else comfyui.base / "output"
    saved = pictures(home, names)
    [stock] = (comfyui.base / "output").glob(f"stock_{parts.__name__}_*.png")
    for path in saved:
        assert (pixels(path) == pixels(stock)).all(), path
    # What dropping a picture on ComfyUI restores.
    with Image.open(saved[0]) as image:
        held = json.loads(image.info["prompt"])
    assert {name: {key: node[key] for key in ("class_type", "inputs")} for name, node in held.items()} == g.nodes
    warned = "ComfyUI decoded and saved 2 pictures itself" in comfyui.log.read_text()
    assert warned == (parts is local)


def test_the_next_batch_does_not_wait_for_the_pictures(comfyui: ComfyUI) -> None:
    g = Graph()
    model, clip, vae = remote(g, CHECKPOINT)
    latent = sample(g, model, encode(g, clip), empty(g), seed=11)
    saver(g, vae, latent_1=latent)
    status = g("LunaQueueStatus", limit=3)
    run = comfyui.run(g)
    told = run.history["outputs"][status.node]["text"][0]
    assert "jobs a minute" in told


def test_a_full_set_of_bad_inputs_is_told(comfyui: ComfyUI) -> None:
    g = Graph()
    _, _, vae = remote(g, CHECKPOINT)
    saver(g, vae, latent_1=empty(g), save_path="../out")
    with pytest.raises(RunFailed, match=r"leaves the output folder"):
        comfyui.run(g)
    g = Graph()
    saver(g, remote(g, CHECKPOINT)[2])
    with pytest.raises(RunFailed, match="nothing to save"):
        comfyui.run(g)


def test_a_server_that_goes_away_in_a_run_costs_no_picture(models, luna, torchserve: TorchServe, tmp_path) -> None:
    g = Graph()
    model, clip, _ = local(g, CHECKPOINT)
    latent = sample(g, model, encode(g, clip), empty(g, 256, 256), steps=20)
    saver(g, remote(g, CHECKPOINT)[2], latent_1=latent, filename="there")
    with TorchServe(torchserve.store, tmp_path / "run", Ports.free()) as running:
        server = connect(running)
        for model in ("repository", "sd15.unet", "sd15.clip", "sd15.vae"):
            server.load(model)
            server.wait_ready([model])
        there = {
            "LUNA_INFERENCE": running.inference,
            "LUNA_MANAGEMENT": running.management,
            "LUNA_TOKEN_FILE": str(running.key_file),
        }
        with ComfyUI(tmp_path / "comfyui", models, luna | there) as comfyui:
            pictures(torchserve.store.parent / "output", promised(comfyui.run(g), g))
            g.nodes[latent.node]["inputs"]["seed"] = 6
            g.nodes[str(len(g.nodes))]["inputs"]["filename"] = "here"
            prompt = comfyui.start(g)
            comfyui.wait_for_step()
            running.stop()
            names = promised(comfyui.wait(prompt), g)
            assert names == ["luna/here_S1.png"]
            assert (comfyui.base / "output" / names[0]).is_file()
            assert "ComfyUI decoded and saved 1 pictures itself, because no server at" in comfyui.log.read_text()
