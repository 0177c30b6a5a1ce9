"""Goes on under the pins of requirements-server.txt, in .venv if need be. Standard library only."""

import os
import re
import signal
import subprocess
import sys
import time
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
OLDEST = (3, 11)


def ensure(requirements: str = "requirements-server.txt") -> float:
    """Return in an interpreter that holds every pinned package, with the repository itself importable.

    The result is when the user started the script, as `time.time()` has it.

    Where the running one does not, .venv is made or brought up to date, and the script starts again under it. The check
    reads the installed packages' own records: it notices an interrupted installation, and takes milliseconds.
    """
    started = os.environ.pop("LUNA_STARTED", str(time.time()))
    if sys.version_info < OLDEST:
        sys.exit(f"Python {'.'.join(map(str, OLDEST))} or later is needed; this is {sys.version.split()[0]}.")
    pins = _pins(ROOT / requirements)
    if not (wrong := _wrong(pins)):
        sys.path[0] = str(ROOT)
        return float(started)
    if Path(sys.prefix).resolve() != VENV.resolve():
        if not PYTHON.exists():
            _make()
    else:
        _install(requirements, wrong)
    os.environ["LUNA_STARTED"] = started
    _start_again()


def _pins(file: Path) -> dict[str, str]:
    pins: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            pins |= _pins(file.parent / line[3:].strip())
        elif match := re.match(r"([\w.-]+)==([\w.]+)", line):
            pins[match[1]] = match[2]
    return pins


def _wrong(pins: dict[str, str]) -> dict[str, str]:
    """{package: what is the matter with it}, builds such as 2.13.0+cpu counting as 2.13.0."""
    wrong = {}
    for package, pinned in pins.items():
        try:
            installed = version(package).split("+")[0]
        except PackageNotFoundError:
            installed = "missing"
        if installed != pinned:
            wrong[package] = f"{installed}, not {pinned}"
    return wrong


def _make() -> None:
    print(f"Making {VENV} ...", flush=True)
    try:
        venv.EnvBuilder(with_pip=True, clear=VENV.exists()).create(VENV)
    except subprocess.CalledProcessError:
        sys.exit(f"Python's venv could not make {VENV}. On Debian and Ubuntu: apt install python3-venv")


def _install(requirements: str, wrong: dict[str, str]) -> None:
    if os.environ.get("LUNA_INSTALLING") == requirements:
        sys.exit(f"pip installed {requirements}, yet these are wrong: {wrong}. Delete {VENV} and try again.")
    print(f"Installing {len(wrong)} of the packages that {requirements} pins (a few GB the first time) ...", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-r", str(ROOT / requirements)]
    if status := subprocess.call(pip):
        sys.exit(f"pip failed with status {status}; its last lines say why. Nothing else was changed: run this again.")
    os.environ["LUNA_INSTALLING"] = requirements


def _start_again() -> None:
    command = [str(PYTHON), *sys.argv]
    if os.name != "nt":
        os.execv(PYTHON, command)
    # Windows has no exec. Ctrl-C reaches both processes, and it is the other's to act on.
    for name in ("SIGINT", "SIGBREAK"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.exit(subprocess.Popen(command).wait())
