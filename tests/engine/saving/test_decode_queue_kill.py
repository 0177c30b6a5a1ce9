"""Killed at any step, the queue loses nothing it accepted and shows nothing half done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
needs_fork = pytest.mark.skipif(os.name == "nt", reason="one process is forked per step; Windows has no fork")


def kill_at_steps(folder: Path, first: int, stride: int) -> dict:
    command = [sys.executable, "-m", "tests.engine.saving.kill_points", str(folder), str(first), str(stride)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["failures"] == [], done.stderr[-4000:]
    return outcome


@needs_fork
def test_a_kill_at_some_steps(tmp_path):
    assert kill_at_steps(tmp_path, first=2, stride=6)["killed"] >= 5


@needs_fork
@pytest.mark.slow
def test_a_kill_at_every_step(tmp_path):
    assert kill_at_steps(tmp_path, first=0, stride=1)["killed"] >= 40
