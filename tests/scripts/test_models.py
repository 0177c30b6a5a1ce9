"""The commands for daily use, as their user types them, and what a server remembers from one start to the next."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from luna_client.server import Server
from luna_protocol.messages import UNetForward
from serving.archives import pack_checkpoint
from serving.measurements import Gpu, GpuLog, Metrics, parse_gpus
from serving.torchserve import ROOT, Ports
from tests.checkpoints import write

READY = "Ctrl-C stops it"
DECLARED = ("LunaRequests", "LunaRunSeconds_sum", "LunaBatchSize_count", "LunaWeightsBytes", "LunaMemoryBytes")


@contextmanager
def serving(environment: dict[str, str], home: Path, port: int, *arguments: str | Path) -> Iterator[None]:
    with (home / "serve.log").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "serve.py", "--port", str(port), *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 500
        while READY not in (home / "serve.log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (home / "serve.log").read_text()
            time.sleep(0.5)
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, (home / "serve.log").read_text()
    finally:
        process.kill()
        process.wait()


def dtypes(told: str) -> list[str]:
    """Those of the workers in a printed table that serve."""
    return [line.split("│")[4].strip() for line in told.splitlines() if "ready │" in line]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(os.name == "nt", reason="ends the server by SIGTERM")
def test_a_day_with_a_comfyui_next_to_it(tmp_path: Path) -> None:
    comfyui = tmp_path / "comfyui"
    file = write(comfyui / "models" / "checkpoints" / "art" / "tiny.safetensors", "tiny_sd15")
    os.link(file, file.with_name("second.safetensors"))
    ports = Ports.free()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LUNA_")}
    environment = kept | {
        "LUNA_HOME": str(tmp_path),
        "LUNA_TOKEN_FILE": str(tmp_path / "run" / "key_file.json"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }

    def command(name: str, *arguments: str) -> tuple[int, str]:
        line = [sys.executable, ROOT / "scripts" / f"{name}.py", "--port", str(ports.inference), *arguments]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=500)
        return done.returncode, done.stdout + done.stderr

    status, told = command("add_checkpoint", "--comfyui", str(comfyui), "art/tiny.safetensors")
    assert status == 0 and "packed" in told, told

    with serving(environment, tmp_path, ports.inference, "--only", "unet", "--comfyui", comfyui):
        status, told = command("models", "list")
        assert status == 0 and "art/second.safetensors" in told and "ready" in told, told
        status, told = command("monitor", "--once", "--csv", str(tmp_path / "memory.csv"))
        assert status == 0 and "tiny.unet" in told and "per second" in told, told
        assert (tmp_path / "memory.csv").read_text().startswith("timestamp,elapsed_sec")
        server = Server(f"http://127.0.0.1:{ports.inference}", key_file=tmp_path / "run" / "key_file.json")
        tensors = {"x": torch.ones(1, 4, 8, 8), "timesteps": torch.ones(1), "context": torch.ones(1, 77, 64)}
        assert server.call("tiny.unet", UNetForward(), tensors)[1]["out"].shape == (1, 4, 8, 8)
        deadline = time.monotonic() + 10  # engines report once a second
        while not set(DECLARED) <= (exposed := Metrics.read(f"http://127.0.0.1:{ports.inference + 2}").names()):
            assert time.monotonic() < deadline, exposed
            time.sleep(0.2)
        assert command("models", "unload", "tiny.unet")[0] == 0
        status, told = command("models", "load", "nothing.unet")
        assert status == 1 and "the store has no 'nothing.unet'" in told

    status, told = command("add_checkpoint", "--comfyui", str(comfyui), "--version", "2.0", "art/tiny.safetensors")
    assert status == 0 and "No server" in told, told

    with serving(environment, tmp_path, ports.inference, "--only", "unet", "--comfyui", comfyui):
        # What was unloaded stays so; what is new is loaded.
        loaded, others = command("models", "list")[1].split("not loaded:")
        assert "tiny.unet/2.0" in loaded and "tiny.unet/1.0" in others
        status, told = command("models", "load", "tiny.unet")
        assert status == 0 and "ready" in told, told
        status, told = command("models", "versions", "tiny.unet")
        assert status == 0 and told.split() == ["1.0", "2.0", "(default)"], told
        status, told = command("models", "set-default", "tiny.unet", "1.0")
        assert status == 0 and told.split() == ["1.0", "(default)", "2.0"], told

    with serving(environment, tmp_path, ports.inference, "--only", "unet", "--comfyui", comfyui):
        assert command("models", "versions", "tiny.unet")[1].split() == ["1.0", "(default)", "2.0"]
        loaded, others = command("models", "list")[1].split("not loaded:")
        assert "tiny.unet/2.0" in loaded and "tiny.unet/1.0" in loaded and "tiny.clip/1.0" in others
        version = ("--comfyui", str(comfyui), "--version", "2.0", "--dtype", "bf16")
        status, told = command("add_checkpoint", *version, "art/tiny.safetensors")
        assert status == 0 and dtypes(told) == ["bfloat16"] * 3, told
        status, told = command("models", "scale", "tiny.unet", "2")
        assert status == 0 and sorted(dtypes(told)) == ["bfloat16", "float32"], told
        assert "ready │ 2 " in told, told
        status, told = command("models", "unload", "tiny.unet")
        assert status == 0, told
        loaded, others = command("models", "list")[1].split("not loaded:")
        assert "tiny.unet" not in loaded and "tiny.unet/2.0" in others and "tiny.unet/1.0" in others


def test_other_versions_lie_beside_the_first(tmp_path: Path) -> None:
    file = write(tmp_path / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
    store = tmp_path / "model_store"
    pack_checkpoint(file, store, home=tmp_path)
    second = pack_checkpoint(file, store, home=tmp_path, version="2.0")
    assert sorted(archive.model for archive in second) == ["tiny.clip/2.0", "tiny.unet/2.0", "tiny.vae/2.0"]
    assert (store / "tiny.unet.mar").is_file() and (store / "tiny.unet@2.0.mar").is_file()


def test_gpu_memory_is_read_and_logged_with_the_columns_that_scripts_know(tmp_path: Path) -> None:
    found = parse_gpus("0, 1024, 24576\n1, 12288, 24576\n2, [N/A], [N/A]\n")
    assert found == [Gpu(0, 1 << 30, 24 << 30), Gpu(1, 12 << 30, 24 << 30)]
    with (tmp_path / "log.csv").open("w", newline="") as file:
        GpuLog(file, found).add(found)
    header, row = (tmp_path / "log.csv").read_text().splitlines()
    assert header.split(",")[:7] == [
        "timestamp",
        "elapsed_sec",
        "gpu0_used_gb",
        "gpu0_total_gb",
        "gpu0_percent",
        "gpu0_used_mb",
        "gpu0_free_mb",
    ]
    assert row.split(",")[7:] == ["12.00", "24.00", "50.0", "12288", "12288"]


def test_metrics_are_summed_over_labels() -> None:
    metrics = Metrics(
        "# TYPE LunaRequests counter\n"
        'LunaRequests{ModelName="a",Outcome="ok"} 3\nLunaRequests{ModelName="a",Outcome="full"} 1\n'
        '# TYPE R histogram\nR_bucket{le="+Inf"} 4\nR_sum 2.0\nR_count 4.0\n'
    )
    assert metrics.total("LunaRequests", ModelName="a") == 4
    assert metrics.total("LunaRequests", Outcome="ok") == 3
    assert metrics.mean("R") == 0.5 and metrics.mean("other") is None
