"""Loading must not hold a checkpoint twice; measured in a fresh process, because a peak cannot be reset."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoints import detect, read_header
from engine.weights import read_tensors
from tests import checkpoints

ROOT = Path(__file__).resolve().parents[2]

MEASURE = """
import sys, torch
from engine.checkpoints import detect, read_header
from engine.weights import DTYPES
from engine.unet import UNet
def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
path, dtype = sys.argv[1:]
part = detect(read_header(path)).parts["unet"]
before = status("VmRSS")
unet = UNet.load(path, part, DTYPES[dtype], torch.device("cpu"))
touched = sum(float(parameter.sum()) for parameter in unet.model.parameters())
print((status("VmHWM") - before) / sum(parameter.nbytes for parameter in unet.model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    shape = replace(checkpoints.SHAPES["sd15"], clip_l=checkpoints.TextShape(64, 1))
    return checkpoints.write(tmp_path_factory.mktemp("large") / "large.safetensors", shape, torch.float16)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_peak_is_the_tensors_size(large, dtype):
    run = [sys.executable, "-c", MEASURE, large, dtype]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.15


def test_what_lies_aligned_in_the_file_is_shared_with_it(tmp_path):
    """Two loads of one file on the CPU are the same pages of the page cache, not copies: writing the file shows it."""
    name = "input_blocks.0.0.weight"
    written = checkpoints.write(tmp_path / "written.safetensors", "tiny_sd15")
    raw = load_file(written)[f"model.diffusion_model.{name}"].numpy().tobytes()
    path = checkpoints.shifted(written, -_place(written, raw) % 64, tmp_path / "mapped.safetensors")
    part = detect(read_header(path)).parts["unet"]
    tensors = read_tensors(path, part, "unet", torch.float32, torch.device("cpu"))
    with path.open("r+b") as file:
        file.seek(_place(path, raw, 0))
        file.write(b"\0\0\0\0")
    assert tensors[name].flatten()[0].item() == 0


def _place(path: Path, raw: bytes, since_header: int = 1) -> int:
    """Where in the file `raw` begins, counted from its beginning or from the end of its header."""
    content = path.read_bytes()
    return content.index(raw) - since_header * (8 + int.from_bytes(content[:8], "little"))
