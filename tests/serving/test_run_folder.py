"""One server a run folder: the second one says so and leaves all as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.run_folder import RunFolder
from serving.torchserve import ROOT, Ports, TorchServe
from tests.conftest import connect


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    kept = [path for path in folder.glob("*") if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept}


def test_a_folder_is_one_process_s_until_it_lets_go(tmp_path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.take()
    with pytest.raises(RuntimeError, match=rf"a server runs in .*run already \(process {os.getpid()}\)"):
        second.take()
    first.release()
    second.take()
    second.release()


def test_what_a_killed_process_took_is_free(tmp_path) -> None:
    code = "import os; from serving.run_folder import RunFolder; from pathlib import Path; "
    code += f"RunFolder(Path({str(tmp_path)!r})).take(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    RunFolder(tmp_path).take()


def test_a_second_serve_of_one_run_folder_changes_nothing(torchserve: TorchServe, tmp_path) -> None:
    before = contents(torchserve.run)
    command = [sys.executable, ROOT / "scripts" / "serve.py", "--port", "0", "--run", torchserve.run]
    done = subprocess.run(
        [*command, "--store", tmp_path / "store"], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"(process {os.getpid()})" in done.stdout.replace("\n", "") and "Traceback" not in done.stderr
    assert contents(torchserve.run) == before
    assert connect(torchserve).models()  # its tokens still open it


def test_a_serve_whose_port_is_taken_changes_nothing(torchserve: TorchServe, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "registered.json").touch()
    (run / "key_file.json").write_text("{}")
    monkeypatch.setattr("serving.torchserve.PORT_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="is taken"):
        TorchServe(tmp_path / "store", run, torchserve.ports).start()
    assert (run / "registered.json").exists() and (run / "key_file.json").exists()
    TorchServe(tmp_path / "store", run, Ports.free())._folder.take()
