"""An engine without TorchServe: its process, models held in it, and a client that knows no other way than its door."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.process import EngineRecord
from luna_client.server import Server
from luna_protocol.door import Connection, connect
from luna_protocol.messages import Index, ServedModel, Worker, validate
from serving.torchserve import ROOT

START_SECONDS = 120


class LocalEngine:
    """The engine of a device, "cpu" or a GPU's number."""

    def __init__(self, process: subprocess.Popen, record: EngineRecord):
        self.process = process
        self._address, self._key = record.address, record.key
        self._held: dict[str, Connection] = {}

    def hold(self, model: str, **settings: Any) -> float:
        """Has a model loaded; returns the seconds that it took.

        Raises:
            RuntimeError: it was not, and why.
        """
        begun = time.monotonic()
        connection = self._held[model] = connect(self._address)
        connection.send({"op": "hold", "key": self._key, "model": model, "settings": settings, "seconds": 600})
        told = {"state": "loading"}
        while told["state"] == "loading":
            told, _ = connection.receive()
        if told["state"] == "failed":
            raise RuntimeError(f"{model}: {told['reason']}")
        return time.monotonic() - begun

    def release(self, model: str) -> None:
        self._held.pop(model).close()
        while model in self.workers():
            time.sleep(0.05)

    def workers(self) -> dict[str, Worker]:
        connection = connect(self._address)
        try:
            connection.send({"op": "status"})
            told, _ = connection.receive()
        finally:
            connection.close()
        return {model: validate(Worker, fields) for model, fields in told["models"].items()}

    def client(self) -> Server:
        server = Server("http://127.0.0.1:9")  # where nothing listens
        server.index = self.index
        return server

    def index(self) -> Index:
        models = self.workers().items()
        return Index(models=[ServedModel(name=name, role="unet", workers=[worker]) for name, worker in models])


@contextmanager
def local_engine(key: str, run: Path, **environment: str) -> Iterator[LocalEngine]:
    """Starts the engine, and ends it."""
    run.mkdir(parents=True, exist_ok=True)
    record_file = run / f"engine-{key}.json"
    with tempfile.TemporaryDirectory(prefix="luna") as scratch, (run / f"engine-{key}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.process", key, str(record_file)],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": scratch, "PYTHONPATH": str(ROOT)} | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while (record := EngineRecord.read(record_file)) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no engine:\n{(run / f'engine-{key}.log').read_text()[-3000:]}")
                time.sleep(0.05)
            yield LocalEngine(process, record)
        finally:
            process.terminate()
            process.wait(30)
