"""Each worker's account of itself, in a small file that the repository model reads.

TorchServe tells a worker nothing about the others, and its management API wants a token that a worker does not have. A
file per process under the run folder serves instead; what a killed worker leaves is told by its dead process.
"""

import os
import time
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from protocol.messages import Worker

_INTERVAL = 1.0  # seconds between writes of counters


class _Record(BaseModel):
    model: str
    server_pid: int
    started: float
    worker: Worker


class WorkerState:
    """Writes this process's record; `update` is cheap enough for every request."""

    def __init__(self, run: Path, model: str, worker: Worker):
        self.folder = run / "workers"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"{os.getpid()}.json"
        self.record = _Record(
            model=model, server_pid=os.getppid(), started=psutil.Process().create_time(), worker=worker
        )
        self._written = 0.0
        self._write()

    def update(self, now: bool = False, **changes) -> None:
        """Changes fields of the `Worker`, written at once when `now`, else at most once a second."""
        for field, value in changes.items():
            setattr(self.record.worker, field, value)
        if now or time.monotonic() - self._written > _INTERVAL:
            self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".tmp")
        partial.write_text(self.record.model_dump_json())
        os.replace(partial, self.path)
        self._written = time.monotonic()


def live_workers(run: Path, server_pid: int) -> dict[str, list[Worker]]:
    """{model: its live workers} of the server with this process id; records of dead processes are removed."""
    found: dict[str, list[Worker]] = {}
    for path in sorted((run / "workers").glob("*.json")):
        try:
            record = _Record.model_validate_json(path.read_text())
        except (OSError, ValidationError):
            continue
        if not _alive(record):
            path.unlink(missing_ok=True)
        elif record.server_pid == server_pid:
            found.setdefault(record.model, []).append(record.worker)
    return found


def _alive(record: _Record) -> bool:
    try:
        return abs(psutil.Process(record.worker.pid).create_time() - record.started) < 1
    except psutil.Error:
        return False
