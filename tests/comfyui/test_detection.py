"""What ComfyUI's own detection makes of files, our proxies make of what the server says of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoints import detect, part_shapes, read_header
from engine.layouts import marker_names
from engine.weights import read_markers
from luna_protocol.messages import ModelDescription, ServedModel
from tests import checkpoints
from tests.comfyui.comfyui import ROOT

SDXL = checkpoints.SHAPES["tiny_sdxl"]
CLIP_G = "conditioner.embedders.1.model."
MARKERS = {
    "plain": {},
    "v_pred": {"v_pred": torch.ones(0), "ztsnr": torch.ones(0)},
    "playground": {"edm_mean": torch.ones(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)},
    "cosxl": {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)},
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")
    tensors = checkpoints.state_dict(SDXL)
    unet = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    for name, markers in MARKERS.items():
        describe(folder / f"{name}.json", unet | markers)
    clip_g = {key.removeprefix(CLIP_G): tensor for key, tensor in tensors.items() if key.startswith(CLIP_G)}
    describe(folder / "refiner.json", {f"conditioner.embedders.0.model.{key}": t for key, t in clip_g.items()})
    describe(folder / "both.json", {key: tensor for key, tensor in tensors.items() if key.startswith("conditioner.")})
    worker = Path(__file__).with_name("detection_worker.py")
    environment = os.environ | {"PYTHONPATH": os.environ.get("COMFYUI_PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    subprocess.run([python, worker, os.environ["COMFYUI_DIR"], ROOT, folder], env=environment, check=True)
    lines = map(json.loads, (folder / "seen.jsonl").read_text().splitlines())
    return {line.pop("name"): line for line in lines}


def describe(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes what the server says of a file with these tensors."""
    file = path.with_suffix(".safetensors")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    header = read_header(file)
    found = detect(header)
    [(role, part)] = found.parts.items()
    description = ModelDescription(
        model=ServedModel(name=f"{path.stem}.{role}", role=role, family=found.family),
        shapes={component: part_shapes(header, part, component) for component in part.names},
        markers=read_markers(file, marker_names(header)),
    )
    path.write_text(description.model_dump_json())


def test_markers_choose_the_sampling(seen):
    assert seen["plain"]["type"] == "EPS"
    assert seen["v_pred"]["type"] == "V_PREDICTION"
    assert seen["v_pred"]["sigmas"][1] > 1000  # zero terminal signal-to-noise
    assert (seen["cosxl"]["type"], seen["cosxl"]["sigmas"][1]) == ("V_PREDICTION_EDM", pytest.approx(120))


def test_playground_is_sampled_as_edm_in_its_own_latents(seen):
    assert (seen["playground"]["type"], seen["playground"]["latent"]) == ("EDM", "SDXL_Playground_2_5")
    assert seen["playground"]["sigmas"] == pytest.approx([0.002, 80])


def test_a_refiner_s_encoder_is_clip_g_alone(seen):
    assert (seen["refiner"]["encoder"], seen["both"]["encoder"]) == ("clip_g", None)
    assert "clip_g.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight" in seen["refiner"]["keys"]
    assert set(seen["refiner"]["keys"]) < set(seen["both"]["keys"])
