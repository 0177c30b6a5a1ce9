"""Setting up, without a network: pip installs a package that the test makes."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from serving.torchserve import ROOT

PROBE = """
import _environment
started = _environment.ensure()
import luna_probe, sys, time
print(luna_probe.VERSION, sys.prefix, sys.argv[1:], time.time() - started >= 0, sys.path[0])
"""


def wheel(folder: Path, version: str) -> None:
    folder.mkdir(exist_ok=True)
    info = f"luna_probe-{version}.dist-info"
    with zipfile.ZipFile(folder / f"luna_probe-{version}-py3-none-any.whl", "w") as file:
        file.writestr("luna_probe.py", f"VERSION = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: luna-probe\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "a repository"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "_environment.py", root / "scripts")
    (root / "scripts" / "probe.py").write_text(PROBE)
    (root / "requirements-server.txt").write_text("# pins\nluna-probe==1.0  # why\n")
    wheel(tmp_path / "wheels", "1.0")
    wheel(tmp_path / "wheels", "1.1")
    return root


def start(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(repository.parent / "wheels")}
    command = [sys.executable, repository / "scripts" / "probe.py", *arguments]
    return subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_environment_is_made_used_again_and_brought_up_to_date(repository: Path) -> None:
    first = start(repository, "--option", "two words")
    assert first.returncode == 0, first.stderr
    result = first.stdout.splitlines()[-1]
    assert result == f"1.0 {repository / '.venv'} ['--option', 'two words'] True {repository}"

    begun = time.monotonic()
    second = start(repository)
    assert len(second.stdout.splitlines()) == 1 and second.stdout.startswith("1.0 ")
    assert time.monotonic() - begun < 10

    (repository / "requirements-dev.txt").write_text("-r requirements-server.txt\n")
    (repository / "requirements-server.txt").write_text("luna-probe==1.1\n")
    third = start(repository)
    assert third.stdout.splitlines()[-1].startswith("1.1 ")

    (repository / "requirements-server.txt").write_text("luna-probe==9.9\n")
    fourth = start(repository)
    assert fourth.returncode != 0 and "pip failed" in fourth.stderr


def test_an_interpreter_that_has_everything_is_used_as_it_is() -> None:
    code = "import _environment, sys; _environment.ensure(); print(sys.executable)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == sys.executable
