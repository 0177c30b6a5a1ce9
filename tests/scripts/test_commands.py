"""The commands as users start them: processes of their own, with no Java on the PATH."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from luna_client.server import Server
from serving.torchserve import ROOT, TorchServe
from tests.checkpoints import write

READY = "Ctrl-C stops it"
POSIX = os.name == "posix"
STOPPING = ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"] if POSIX else ["CTRL_BREAK_EVENT"]


def environment(home: Path, **more: str) -> dict[str, str]:
    """As on a machine without Java."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LUNA_", "JAVA"))}
    return kept | {"PATH": str(home), "LUNA_HOME": str(home), "COLUMNS": "200", "OMP_NUM_THREADS": "1"} | more


def command(name: str, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, ROOT / "scripts" / f"{name}.py", *arguments]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """serve.py with a store of one broken archive, once it is ready; its output is in said.txt under the home."""
    (tmp_path / "model_store").mkdir()
    (tmp_path / "model_store" / "half.mar").write_bytes(b"PK\x03\x04")
    said = (tmp_path / "said.txt").read_text
    with (tmp_path / "said.txt").open("wb") as output:
        process = subprocess.Popen(
            command("serve", "--port", "0"),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(tmp_path, TMPDIR=str(tmp_path)),
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
    try:
        wait_for(lambda: READY in said(), process, said)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition, process: subprocess.Popen | None = None, told=str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, told()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPING)
def test_nothing_is_left_of_serve_whatever_ends_it(serving: subprocess.Popen, tmp_path: Path, name: str) -> None:
    if name == "SIGHUP" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        pytest.skip("SIGHUP is ignored here, as under nohup, and serve.py inherits that")
    family = psutil.Process(serving.pid).children(recursive=True)
    assert any("java" in process.name() for process in family)
    assert any("model_service_worker.py" in " ".join(process.cmdline()) for process in family)
    assert list(tmp_path.glob("lunaserve-*"))
    serving.send_signal(getattr(signal, name))
    status = serving.wait(60)
    wait_for(lambda: not any(process.is_running() for process in family), seconds=60)
    wait_for(lambda: not list(tmp_path.glob("lunaserve-*")))
    if name not in ("SIGKILL", "SIGHUP"):
        assert status == 0
        assert (tmp_path / "said.txt").read_text().rstrip().endswith("Stopped.")


@pytest.mark.slow
@pytest.mark.skipif(not POSIX, reason="kills by POSIX means")
def test_serve_ends_with_its_java_and_says_so(serving: subprocess.Popen, tmp_path: Path) -> None:
    family = psutil.Process(serving.pid).children(recursive=True)
    next(process for process in family if "java" in process.name()).kill()
    assert serving.wait(60) == 1
    wait_for(lambda: not any(process.is_running() for process in family), seconds=60)
    said = (tmp_path / "said.txt").read_text()
    assert "TorchServe ended by itself" in said
    assert re.search(r"half\.mar is broken, or no\s+archive of ours", said)


@pytest.mark.slow
def test_quickstart_makes_a_picture_and_leaves_nothing_running(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "tiny.safetensors", "tiny_sd15")
    process = subprocess.Popen(
        command("quickstart", "--checkpoint", checkpoint, "--size", "64"),
        stdout=subprocess.PIPE,
        text=True,
        env=environment(tmp_path, TMPDIR=str(tmp_path)),
    )
    family = psutil.Process(process.pid)
    seen: dict[int, psutil.Process] = {}
    while process.poll() is None:
        seen |= {child.pid: child for child in family.children(recursive=True)}
        time.sleep(0.5)
    output = process.stdout.read()
    assert process.returncode == 0, output
    assert len(seen) >= 6  # guard, Java and four workers
    assert not any(child.is_running() for child in seen.values())
    picture = Path(re.search(r"'a red circle.*': (.*\.png)", output)[1])
    with Image.open(picture) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
    picture.unlink()
    for step in ("environment", "archives", "TorchServe", "loading", "prompt", "sampling", "decode", "shutting down"):
        assert step in output


def add(home: Path, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command("add_checkpoint", *arguments),
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_add_checkpoint_without_a_server_packs_and_says_what_is_next(tmp_path: Path) -> None:
    done = add(tmp_path, write(tmp_path / "tiny.safetensors", "tiny_sd15"), "--port", "9")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "model_store").iterdir()) == [
        "repository.mar",
        "tiny.clip.mar",
        "tiny.unet.mar",
        "tiny.vae.mar",
    ]
    assert "No server" in done.stdout and "scripts/serve.py" in done.stdout


def test_add_checkpoint_tells_each_bad_file_and_adds_the_good(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", "tiny_sd15")
    pickled, cut = tmp_path / "pickled.ckpt", tmp_path / "cut.safetensors"
    pickled.write_bytes(b"PK\x03\x04 a zip, as torch.save writes")
    cut.write_bytes(good.read_bytes()[:-100])
    done = add(tmp_path, pickled, cut, good, tmp_path / "absent.safetensors", "--port", "9")
    assert done.returncode == 1
    for told in ("pickled.ckpt: pickled.ckpt is a pickle", "cut.safetensors: ", "there is no file", "good.unet"):
        assert told in done.stdout
    assert {path.name.split(".")[0] for path in (tmp_path / "model_store").iterdir()} == {"good", "repository"}


@pytest.mark.skipif(not POSIX, reason="bounds files by POSIX means")
def test_add_checkpoint_on_a_full_disk_says_so_in_a_sentence(tmp_path: Path) -> None:
    """No file may be larger than 1,000 bytes, so that copying fails file by file, as it does on a full disk."""
    file = write(tmp_path / "tiny.safetensors", "tiny_sd15")
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    limited += "sys.argv = sys.argv[1:]; sys.path.insert(0, ''); runpy.run_path(sys.argv[0], run_name='__main__')"
    line = [sys.executable, "-B", "-c", limited, *command("add_checkpoint", file, "--port", "9")[1:]]
    scripts = {"PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(line, env=environment(tmp_path, **scripts), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"could not be packed: .*File too large.*is there room in", " ".join(done.stdout.split()))


@pytest.mark.slow
def test_add_checkpoint_has_a_running_server_serve_it(
    tmp_path: Path, home: Path, torchserve: TorchServe, server: Server
):
    file = write(home / "models" / "checkpoints" / "added.safetensors", "tiny_sd15", seed=1)
    options = ("--port", str(torchserve.ports.inference), "--store", torchserve.store)
    done = add(home, file, *options, LUNA_TOKEN_FILE=str(torchserve.key_file))
    assert done.returncode == 0, done.stdout + done.stderr
    served = {model.name: model for model in server.index().models if model.workers}
    before = {name: served[name].workers[0].pid for name in ("added.unet", "added.clip", "added.vae")}
    again = add(home, file, *options, LUNA_TOKEN_FILE=str(torchserve.key_file))
    assert again.returncode == 0 and again.stdout.count("already there") == 3
    served = {model.name: model for model in server.index().models}
    assert {name: served[name].workers[0].pid for name in before} == before
    for name in before:
        server.unregister(name)
