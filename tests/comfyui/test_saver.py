"""Luna Multi Saver and Luna Queue Status in a real ComfyUI."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy
import pytest
from PIL import Image

from serving.archives import pack_checkpoint, pack_repository
from serving.torchserve import Ports, TorchServe
from tests.comfyui.browser import browser
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


def told(run, g: Graph) -> tuple[list[str], list[str]]:
    """The files that the saver names, and what it says besides."""
    node = next(name for name, node in g.nodes.items() if node["class_type"] == "LunaMultiSaver")
    texts = run.history["outputs"][node]["text"]
    files = [text for text in texts if Path(text).suffix in (".png", ".webp", ".latent")]
    return files, texts[len(files) :]


def promised(run, g: Graph) -> list[str]:
    return told(run, g)[0]


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
    assert "jobs a minute" in run.history["outputs"][status.node]["text"][0]


def test_a_full_set_of_bad_inputs_is_told(comfyui: ComfyUI) -> None:
    for template, reason in (("../out", "leaves the output folder"), ("x" * 600, "600 characters")):
        g = Graph()
        _, _, vae = remote(g, CHECKPOINT)
        saver(g, vae, latent_1=empty(g), save_path=template)
        with pytest.raises(RunFailed, match=reason) as refused:
            comfyui.run(g)
        assert refused.value.node == "validation", "before anything is sampled"
    g = Graph()
    saver(g, remote(g, CHECKPOINT)[2])
    with pytest.raises(RunFailed, match="nothing to save"):
        comfyui.run(g)


def test_what_can_be_saved_is_saved_and_the_rest_is_said(comfyui: ComfyUI, torchserve: TorchServe) -> None:
    there, here = torchserve.store.parent / "output", comfyui.base / "output"
    g = Graph()
    _, _, vae = remote(g, CHECKPOINT)
    nan = g("LatentMultiply", samples=empty(g), multiplier=float("nan"))
    batch = g("LatentBatch", samples1=empty(g), samples2=nan)
    saver(g, vae, latent_1=batch, filename="%date:yyyy%_%KSampler.seed%", affix_1="a" * 90)
    files, notes = told(comfyui.run(g), g)
    assert len(files) == 1 and re.fullmatch(r"luna/\d{4}_%KSampler\.seed%_a{64}_00\.png", files[0])
    pictures(there, files)
    for note in ("cut to 64", "latent_1 holds NaN or infinity in batch row 1", "%KSampler.seed% is no variable"):
        assert any(note in each for each in notes) and note in comfyui.log.read_text()

    # A server that refuses the job decodes, and ComfyUI saves.
    g = Graph()
    _, _, vae = remote(g, CHECKPOINT)
    heatmap = g("SolidMask", value=float("nan"), width=8, height=8)
    saver(g, vae, latent_1=empty(g), heatmap_positive_original=heatmap, filename="refused")
    files, notes = told(comfyui.run(g), g)
    assert files == ["luna/refused_S1.png"] and (here / files[0]).is_file()
    assert "itself, without heatmaps, because heatmap_positive_original holds NaN" in notes[0]


def test_the_page_fills_in_save_images_templates(comfyui: ComfyUI) -> None:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not on the PATH")
    comfyui.post("/settings", {"Comfy.TutorialCompleted": True})
    with browser(chromium, chromedriver) as page:
        page.open(comfyui.url)
        known = "return Boolean(window.LiteGraph?.registered_node_types.LunaMultiSaver)"
        page.until(lambda: page.script(known), "the node")
        sent = page.script(
            """
            const [saver, latent] = ["LunaMultiSaver", "EmptyLatentImage"].map((type) => LiteGraph.createNode(type));
            comfyAPI.app.app.graph.add(saver);
            comfyAPI.app.app.graph.add(latent);
            const given = { filename: "%date:yyyy%_%EmptyLatentImage.width%_%seed%", affix_1: "%year%" };
            for (const name in given) saver.widgets.find((widget) => widget.name === name).value = given[name];
            return comfyAPI.app.app.graphToPrompt().then(({ output }) => output[saver.id].inputs);
            """
        )
    assert re.fullmatch(r"\d{4}_512_%seed%", sent["filename"]) and sent["affix_1"] == "%year%"


def test_a_server_that_goes_away_in_a_run_costs_nothing(models: Path, tmp_path: Path, monkeypatch) -> None:
    # One file is on the server alone: what is sampled for its VAE can only be kept as a latent.
    home = tmp_path / "home"
    (home / "checkpoints").mkdir(parents=True)
    lone = home / "checkpoints" / "lone.safetensors"
    os.link(models / "checkpoints" / CHECKPOINT, lone)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LUNA_CHECKPOINTS", os.pathsep.join(map(str, (models / "checkpoints", lone.parent))))
    pack_repository(home / "model_store", home)
    for file in (models / "checkpoints" / CHECKPOINT, lone):
        pack_checkpoint(file, home / "model_store", home=home)

    g = Graph()
    model, clip, _ = local(g, CHECKPOINT)
    latent = sample(g, model, encode(g, clip), empty(g))
    router = g.nodes[(vae := remote(g, CHECKPOINT)[2]).node]
    saver(g, vae, latent_1=latent, filename="there")
    lone_vae = g("LunaModelRouter", **(router["inputs"] | {"vae": lone.name}))[2]
    saver(g, lone_vae, latent_1=latent, filename="lone")
    savers = {node["inputs"]["filename"]: node["inputs"] for node in g.nodes.values() if "filename" in node["inputs"]}
    with TorchServe(home / "model_store", tmp_path / "run", Ports.free()) as running:
        server = connect(running)
        for name in ("repository", "sd15.unet", "sd15.clip", "sd15.vae", "lone.vae"):
            server.load(name)
            server.wait_ready([name])
        there = {
            "LUNA_INFERENCE": running.inference,
            "LUNA_MANAGEMENT": running.management,
            "LUNA_TOKEN_FILE": str(running.key_file),
        }
        with ComfyUI(tmp_path / "comfyui", models, there) as comfyui:
            pictures(home / "output", promised(comfyui.run(g), g))
            g.nodes[latent.node]["inputs"] |= {"seed": 6, "steps": 60}
            for name, inputs in savers.items():
                inputs["filename"] = f"{name}_later"
            prompt = comfyui.start(g)
            comfyui.wait_for_step()
            running.stop()
            run = comfyui.wait(prompt, 600)
            kept = {text for output in run.history["outputs"].values() for text in output["text"][:1]}
            assert kept == {"luna/there_later_S1.png", "luna/lone_later_S1.latent"}
            assert all((comfyui.base / "output" / name).is_file() for name in kept)
            log = comfyui.log.read_text()
            assert "ComfyUI decoded and saved 1 pictures itself, because no server at" in log
            assert "ComfyUI has no 'lone.safetensors' in its folders checkpoints and vae" in log

            # And Load Latent goes on from there.
            os.link(comfyui.base / "output" / "luna" / "lone_later_S1.latent", comfyui.base / "input" / "kept.latent")
            g = Graph()
            images = g("VAEDecode", samples=g("LoadLatent", latent="kept.latent"), vae=local(g, CHECKPOINT)[2])
            g("SaveImage", images=images, filename_prefix="kept")
            comfyui.run(g)
            [kept] = (comfyui.base / "output").glob("kept_*.png")
            assert (pixels(kept) == pixels(comfyui.base / "output" / "luna" / "there_later_S1.png")).all()
