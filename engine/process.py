"""The engine's process: `python -m engine.process KEY RECORD`.

KEY is the device (see `Engine`); RECORD the file that says where the door is, once it is open. The process ends when
nothing has been held for a moment, and takes RECORD along.
"""

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from engine.private_files import replace_privately
from luna_protocol.door import listen

log = logging.getLogger(__name__)

UNWANTED_SECONDS = 60.0  # until the first model is held
IDLE_SECONDS = 5.0  # after the last one was let go: what is loaded next need not import torch again
SWEEP_SECONDS = 60.0  # between looks for shared memory of clients that were killed
HUNG = 71  # exit status


class EngineRecord(BaseModel):
    """Where an engine is, in a file that the processes of its user can read."""

    pid: int
    started: float
    address: str
    key: str

    @classmethod
    def read(cls, path: Path) -> "EngineRecord | None":
        """The record of a living engine."""
        try:
            record = cls.model_validate_json(path.read_text("utf-8"))
            process = psutil.Process(record.pid)
            alive = abs(process.create_time() - record.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValidationError, psutil.Error):
            return None
        return record if alive else None

    def write(self, path: Path) -> None:
        replace_privately(path, self.model_dump_json())


def main(key: str, path: Path) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("engine").setLevel(logging.INFO)
    for ignored in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        # Meant for the server as a whole, which ends this process by letting its models go.
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    folder = Path(tempfile.mkdtemp(prefix="e"))
    listening, address = listen(folder)
    try:
        # Here, as relays import this file for the record, and do without torch.
        from engine.door import Door
        from engine.engine import Engine
        from engine.host_memory import keep_freed_memory
        from luna_protocol.shared_memory import sweep

        keep_freed_memory()
        engine = Engine(key)
        _leave_the_cores_to(engine.scheduler)
        own_key = secrets.token_hex(16)
        Door(engine, listening, address, own_key)
        started = psutil.Process().create_time()
        EngineRecord(pid=os.getpid(), started=started, address=address, key=own_key).write(path)
        _watch(engine, sweep)
    finally:
        with suppress(OSError):
            record = EngineRecord.read(path)
            if record is None or record.pid == os.getpid():
                path.unlink()
        shutil.rmtree(folder, ignore_errors=True)


def _leave_the_cores_to(scheduler) -> None:
    """Lets the compute thread alone use several cores. Each thread that does has a pool of its own, and libgomp counts
    the threads of all: once they are more than the cores, none spins while it waits for the others any longer, and a
    forward of many small layers takes 1.6 times as long."""
    import torch

    threads = torch.get_num_threads()
    scheduler.compute(lambda: torch.set_num_threads(threads), "engine")
    torch.set_num_threads(1)


def _watch(engine, sweep) -> None:
    """Returns when nobody wants this process any longer; ends it where a forward hangs. Calls `sweep` now and then."""
    deadline = swept = time.monotonic() + UNWANTED_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if time.monotonic() > swept:
            swept = time.monotonic() + SWEEP_SECONDS
            sweep()
        if engine.is_wanted:
            deadline = time.monotonic() + IDLE_SECONDS
        if hung := engine.overdue():
            log.critical("a forward of %s takes longer than its archive allows: the engine ends", hung)
            os._exit(HUNG)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
