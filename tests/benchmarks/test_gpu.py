"""The benchmark for a GPU runs whole on a CPU, so that minutes of a GPU are not spent on its mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_rehearsal_answers_every_question() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse"]
    # Compiling on a CPU takes minutes, and tests/engine/test_compilation.py does it.
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    parts = ("load", "step", "LoRA", "ControlNet", "clients", "sampler", "parking")
    assert result["left_out"] == [] and result["device"] == "cpu"
    assert {f"{name} fp32: {part}" for name in ("sd15", "sdxl") for part in parts} < result.keys()
    for name in ("sd15", "sdxl"):
        assert result[f"{name} fp32: step"]["largest_difference"] == 0
        assert result[f"{name} fp32: sampler"]["equal"]
    assert result["sd15: compile"]["served_over_eager"] > 0
