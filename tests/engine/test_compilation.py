"""A compiled UNet computes what the plain one does, whatever a request brings, and is not compiled again for it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from engine.checkpoints import detect, read_header
from engine.compilation import compile_blocks
from engine.unet import UNet
from tests import checkpoints
from tests.engine.conftest import CPU
from tests.engine.lora.test_overlays import Bench
from tests.engine.test_unet import arguments

ROOT = Path(__file__).resolve().parents[2]
# Of one resolution: a compiler takes many seconds for every width.
_TINY = checkpoints.SHAPES["tiny_sd15"]
SHAPE = replace(_TINY, unet=checkpoints.UNetShape(context=64, channels=32, multipliers=(1,), depths=(1,)))
UNCOMPILED = """
import logging, sys
from pathlib import Path
import torch
from engine.checkpoints import detect, read_header
from engine.compilation import compile_blocks
from engine.unet import UNet

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
path = Path(sys.argv[1])
unet = UNet.load(path, detect(read_header(path)).parts["unet"], torch.float32, torch.device("cpu"))
inputs = torch.ones(2, 4, 8, 8), torch.ones(2), torch.ones(2, 77, 64)
with torch.inference_mode():
    plain = unet.forward(*inputs)
    compile_blocks(unet.model, lambda: unet.forward(*inputs))
    print("equal" if torch.equal(unet.forward(*inputs), plain) else "different")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("compilation") / "it.safetensors", SHAPE)


@pytest.mark.slow
def test_one_compilation_serves_all_sizes_and_stacks_and_leaves_the_base_as_it_was(path, noise, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    checkpoints.write_lora(tmp_path / "a.safetensors", SHAPE)
    with torch.inference_mode(False):  # as a worker loads it
        unet = UNet.load(path, detect(read_header(path)).parts["unet"], torch.float32, CPU)
    bench = Bench(unet, tmp_path)
    stack = bench.stack("a")
    sizes = ((2, (16, 16), 77), (4, (16, 24), 77), (3, (13, 9), 154))
    asked = [arguments(unet, noise, *size)[:3] for size in sizes]
    plain = [unet.forward(*inputs) for inputs in asked]
    patched = [bench.forward(stack, inputs) for inputs in asked]
    residual = {"middle": [noise(2, 32, 16, 16)]}
    controlled = unet.forward(*asked[0], control=residual)

    compile_blocks(unet.model, lambda: unet.forward(*asked[0]))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    compiled = [unet.forward(*inputs) for inputs in asked]
    for inputs, base, with_lora, before in zip(asked, plain, patched, compiled, strict=True):
        torch.testing.assert_close(before, base, rtol=0, atol=2e-5)
        torch.testing.assert_close(bench.forward(stack, inputs), with_lora, rtol=0, atol=2e-5)
        assert (with_lora - base).abs().max() > 1e-2
        assert torch.equal(unet.forward(*inputs), before)
    torch.testing.assert_close(unet.forward(*asked[0], control=residual), controlled, rtol=0, atol=2e-5)
    assert counters["stats"]["unique_graphs"] == graphs


def test_without_a_compiler_the_log_says_so_and_nothing_is_compiled(path, tmp_path):
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", UNCOMPILED, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "WARNING the UNet runs uncompiled, as torch.compile fails here: " in done.stdout
    assert done.stdout.splitlines()[-1] == "equal"
