"""A relay's end of its device's engine: the engine is started where there is none, and has a model for as long as the
relay lives."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from engine.private_files import make_private_folder, private
from engine.process import EngineRecord
from luna_protocol.door import Connection, connect
from luna_protocol.errors import Broken, Loading
from luna_protocol.messages import Worker, validate

log = logging.getLogger(__name__)

CODE = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
_STATUS_SECONDS = 5.0
_POLL = 0.02
# What an archive carries, and an engine runs.
PACKAGES = ("luna_protocol", "luna_pictures", "engine", "handlers")
_AGAIN_SECONDS = 5.0
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR", "TEMP")
_DEATHS = 3
_DEATHS_WITHIN = 900.0  # seconds


class EngineLink:
    """Has `model` held by the engine of a device, and another engine when that one ends.

    Args:
        run: the run folder.
        key: the device, see `Engine`.
        settings: the archive's, under the key `handler`.
        seconds: how long one forward may take.
        metrics: is given what the model has to report, from a thread of its own.
    """

    def __init__(
        self,
        run: Path,
        key: str,
        model: str,
        settings: Mapping[str, Any],
        seconds: float,
        metrics: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self.model = model
        self._folder = run / "engines"
        make_private_folder(self._folder)
        self._key = key
        self._hold = {"op": "hold", "model": model, "settings": dict(settings), "seconds": seconds}
        self._metrics = metrics
        self._address: str | None = None
        self._failure = ""
        self._deaths: deque[float] = deque(maxlen=_DEATHS)
        self._idle: list[Connection] = []
        held = threading.Event()
        threading.Thread(target=self._keep, args=(held,), name="engine", daemon=True).start()
        held.wait()

    def borrow(self) -> Connection:
        """A connection to the engine; `give_back` it after a whole answer.

        Raises:
            Broken: the engine does not start.
            Loading: it is being started again.
        """
        if self._failure:
            raise Broken(self._failure, "fix the cause, then load the model again")
        if self._idle:
            return self._idle.pop()
        if self._address is None:
            raise Loading(f"the engine of {self.model} is starting", "try again", retry_after=0.5)
        try:
            return connect(self._address)
        except OSError as error:
            raise Loading(f"the engine of {self.model} has ended: {error}", "try again", retry_after=0.5) from error

    def give_back(self, connection: Connection) -> None:
        self._idle.append(connection)

    def _keep(self, held: threading.Event) -> None:
        """Has the model held for ever: again, as often as the engine ends."""
        while True:
            try:
                self._hold_once(held)
            except Exception as error:
                log.exception("no engine for %s", self.model)
                self._failure = str(error)
                held.set()
                time.sleep(_AGAIN_SECONDS)

    def _hold_once(self, held: threading.Event) -> None:
        """Holds it until its engine ends.

        Raises:
            Broken, OSError: there is no engine.
        """
        record = _record(self._folder, self._key)
        connection, state = connect(record.address), ""
        try:
            connection.send(self._hold | {"key": record.key, "failure": self._fatal()})
            while True:
                told, _ = connection.receive()
                state = told.get("state", state)
                self._metrics(told.get("metrics", []))
                if state != "loading":
                    self._address, self._failure = record.address, ""
                    held.set()
        except (OSError, EOFError):
            log.warning("the engine of %s has ended, and is started again", self.model)
            if state == "loading":
                self._deaths.append(time.monotonic())
        finally:
            self._address = None
            self._idle.clear()
            connection.close()

    def _fatal(self) -> str:
        """Why loading the model once more would not do, or nothing."""
        recent = [death for death in self._deaths if time.monotonic() - death < _DEATHS_WITHIN]
        if len(recent) == _DEATHS:
            return (
                f"{len(recent)} engines in a row ended while they loaded it "
                "(out of memory? See the server's logs, then load it again with scripts/models.py)"
            )
        return ""


def _record(folder: Path, key: str) -> EngineRecord:
    """The record of the device's engine, which is started if there is none.

    Raises:
        Broken: it did not start.
    """
    code = _code_digest()
    name = f"{key}-{_digest(code)}"
    path, output = folder / f"{name}.json", folder.parent / "logs" / f"engine-{key}.log"
    with FileLock(folder / f"{key}.lock", mode=0o600):
        if record := EngineRecord.read(path):
            return record
        for left in folder.glob("*.json"):
            if EngineRecord.read(left) is None:
                left.unlink(missing_ok=True)
        make_private_folder(output.parent)
        with open(output, "ab", opener=private) as log_file:
            process = subprocess.Popen(
                [sys.executable, "-m", "engine.process", key, str(path)],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(copied_code(folder.parent / "code" / code))},
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_SECONDS
        while (record := EngineRecord.read(path)) is None or record.pid != process.pid:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                end = output.read_text("utf-8", errors="replace")[-1000:]
                raise Broken(f"the engine of {key} did not start: {end}", f"see {output}")
            time.sleep(_POLL)
        threading.Thread(target=process.wait, name="engine's end", daemon=True).start()
        return record


def copied_code(folder: Path) -> Path:
    """`folder` with our code in it: that of an archive goes with its model, and the engine stays."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        make_private_folder(partial)
        for package in PACKAGES:
            shutil.copytree(CODE / package, partial / package, ignore=shutil.ignore_patterns("__pycache__"))
        partial.rename(folder)
    return folder


def _code_digest() -> str:
    digest = hashlib.blake2b(digest_size=6)
    for package in PACKAGES:
        for file in sorted((CODE / package).rglob("*.py")):
            digest.update(file.relative_to(CODE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _digest(code: str) -> str:
    """Of our code and what it reads from the environment: engines of others are left to others."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("LUNA_") or name in _VARIABLES}
    return hashlib.blake2b(f"{code} {sorted(ours.items())}".encode(), digest_size=6).hexdigest()


def served(run: Path) -> dict[str, list[Worker]]:
    """{model: what each engine that lives says of it}."""
    found: dict[str, list[Worker]] = {}
    for record in (EngineRecord.read(path) for path in sorted((run / "engines").glob("*.json"))):
        for model, worker in (_status(record.address) if record else {}).items():
            found.setdefault(model, []).append(worker)
    return found


def _status(address: str) -> dict[str, Worker]:
    try:
        connection = connect(address, _STATUS_SECONDS)
        try:
            connection.send({"op": "status"})
            told, _ = connection.receive(_STATUS_SECONDS)
        finally:
            connection.close()
    except (OSError, EOFError) as error:
        log.warning("the engine at %s does not say what it has: %s", address, error)
        return {}
    return {model: validate(Worker, fields) for model, fields in told["models"].items()}
