"""Each worker's account of itself, in a small file that the repository model reads.

TorchServe tells a worker nothing about the others, and its management API wants a token that a worker does not have. A
file per process under the run folder serves instead; what a killed worker leaves is told by its dead process.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock
from pydantic import BaseModel, ValidationError

from handlers.engine.memory_budget import device_key, gigabytes
from handlers.engine.private_files import make_private_folder, replace_privately
from luna_protocol.errors import Broken, Loading, OutOfMemory
from luna_protocol.messages import Worker
from luna_protocol.model_names import archive_name

log = logging.getLogger(__name__)

_INTERVAL = 1.0  # seconds between writes of counters
ROOM_SECONDS = 40.0  # how long a worker waits for room; serve.py makes it by unloading what was idle half as long
_ROOM_POLL = 0.25
KEEPER = "keeper"  # a file in the run folder while somebody there unloads idle models for those that wait
_DEATHS = 3
_DEATHS_WITHIN = 900.0  # seconds
_REPLACED_WITHIN = 180.0


class _Record(BaseModel):
    model: str
    server_pid: int
    started: float
    worker: Worker


class WorkerState:
    """Writes this process's record; `update` is cheap enough for every request."""

    def __init__(self, run: Path, model: str, worker: Worker):
        self.folder = run / "workers"
        for folder in (run, self.folder):
            make_private_folder(folder)
        self.path = self.folder / f"{os.getpid()}.json"
        self.record = _Record(
            model=model, server_pid=os.getppid(), started=psutil.Process().create_time(), worker=worker
        )
        self._run = run
        self._lock = threading.RLock()
        self._written = 0.0
        self._late: threading.Timer | None = None
        self._write()

    def update(self, now: bool = False, **changes) -> None:
        """Changes fields of the `Worker`. Written at once when `now`; else at most once a second, at its end. On a full
        disk it is written later: requests do not depend on it."""
        with self._lock:
            self._change(**changes)
            since = time.monotonic() - self._written
            if now or since > _INTERVAL:
                self._try_to_write()
            elif self._late is None:
                self._late = threading.Timer(_INTERVAL - since, self._try_to_write)
                self._late.daemon = True
                self._late.start()

    def check_deaths(self) -> None:
        """Refuses to load what killed worker after worker; TorchServe would go on for ever, and let clients wait.

        Raises:
            Broken: the last workers of this model died while they loaded. The next start tries again.
        """
        died = [
            (path, record)
            for path, record in _records(self._run)
            if record.model == self.record.model and record.server_pid == self.record.server_pid and _fell(record)
        ]
        recent = [record for _, record in died if time.time() - record.started < _DEATHS_WITHIN]
        if len(recent) >= _DEATHS:
            _forget(path for path, _ in died)
            raise Broken(
                f"{self.record.model} was not loaded: {len(recent)} workers in a row died while loading it",
                "out of memory? See the server's logs, then load it again with scripts/models.py",
            )

    def check_replacement(self) -> None:
        """
        Raises:
            Loading: the model is about to give way to a new archive, and whoever waited would wait for ever.
        """
        if is_replaced(self._run, self.record.model):
            raise Loading(f"{self.record.model} is being replaced", "try again", retry_after=1)

    def loaded(self, weights_bytes: int) -> None:
        """The worker is ready, and the deaths before it are forgotten."""
        self.update(now=True, state="ready", weights_bytes=weights_bytes, last_used=time.time())
        _forget(path for path, record in _records(self._run) if record.model == self.record.model and _fell(record))

    def claim(self, needed: int, budget: int | None, seconds: float = ROOM_SECONDS) -> None:
        """Take `needed` bytes of the device's budget (None: no bound) for this worker's weights, waiting while a keeper
        makes room.

        Raises:
            OutOfMemory: there was none for `seconds`, nobody makes any, or it never can be enough.
        """
        worker = self.record.worker
        device = device_key(worker)
        self._change(budget_bytes=budget)
        deadline = time.monotonic() + seconds
        while True:
            # Two workers that start together must not both see the same room.
            with FileLock(self.folder / "claims.lock", mode=0o600):
                others = live_workers(self._run, self.record.server_pid)
                taken = {
                    model: sum(each.weights_bytes for each in workers if device_key(each) == device and holds(each))
                    for model, workers in others.items()
                }
                if budget is None or sum(taken.values()) + needed <= budget:
                    self._change(state="loading", weights_bytes=needed)
                    self._write()  # or raise: what nobody can read claims nothing
                    return
                self.update(now=True, state="waiting", weights_bytes=needed)
            waits = needed <= budget and (self._run / KEEPER).exists()
            if not waits or time.monotonic() > deadline:
                told = ", ".join(f"{model} {gigabytes(size)}" for model, size in taken.items() if size)
                raise OutOfMemory(
                    f"{self.record.model} needs {gigabytes(needed)} on {device}, whose budget of {gigabytes(budget)} "
                    f"holds {told or 'nothing yet'}",
                    "unload one of them with scripts/models.py, take a smaller dtype, or raise serve.py --memory",
                )
            time.sleep(_ROOM_POLL)

    def _change(self, **changes) -> None:
        for field, value in changes.items():
            setattr(self.record.worker, field, value)

    def _try_to_write(self) -> None:
        try:
            self._write()
        except OSError as error:
            with self._lock:
                self._written, self._late = time.monotonic(), None
            log.warning("the record of %s is not up to date: %s", self.record.model, error)

    def _write(self) -> None:
        with self._lock:
            replace_privately(self.path, self.record.model_dump_json())
            self._written = time.monotonic()
            if self._late is not None:
                self._late.cancel()
                self._late = None


def mark_replaced(run: Path, model: str, replaced: bool) -> None:
    """Have the workers of a model of the store refuse what comes, until told otherwise or for three minutes."""
    mark = _replacement(run, model)
    if replaced:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    else:
        mark.unlink(missing_ok=True)


def is_replaced(run: Path, model: str) -> bool:
    """Whether the model is marked so, and not for too long."""
    try:
        return time.time() - _replacement(run, model).stat().st_mtime < _REPLACED_WITHIN
    except OSError:
        return False


def _replacement(run: Path, model: str) -> Path:
    return run / "replaced" / archive_name(model)


def holds(worker: Worker) -> bool:
    """Whether the worker has its weights in memory, or is about to."""
    return worker.state in ("loading", "ready")


def live_workers(run: Path, server_pid: int | None = None) -> dict[str, list[Worker]]:
    """{model: its live workers}, of the server with this process id where one is given.

    Records of dead processes are removed, but for those that died while loading: `WorkerState.check_deaths` counts
    them.
    """
    found: dict[str, list[Worker]] = {}
    for path, record in _records(run):
        if not _alive(record):
            if not _fell(record) or time.time() - record.started > _DEATHS_WITHIN:
                _forget([path])
        elif server_pid in (None, record.server_pid):
            found.setdefault(record.model, []).append(record.worker)
    return found


def _records(run: Path) -> list[tuple[Path, _Record]]:
    found = []
    for path in sorted((run / "workers").glob("*.json")):
        with suppress(OSError, ValidationError):
            found.append((path, _Record.model_validate_json(path.read_text())))
    return found


def _forget(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _fell(record: _Record) -> bool:
    """Whether the process ended while it loaded."""
    return record.worker.state == "loading" and not _alive(record)


def _alive(record: _Record) -> bool:
    try:
        return abs(psutil.Process(record.worker.pid).create_time() - record.started) < 1
    except psutil.Error:
        return False
