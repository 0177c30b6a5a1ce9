"""A real ComfyUI process with this repository among its custom nodes, driven through its HTTP API."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180


class RunFailed(Exception):
    """A workflow ended in an error; `kind` and `message` are what the user reads, `node` the class it stopped at."""

    def __init__(self, kind: str, message: str, node: str) -> None:
        super().__init__(f"{node}: {kind}: {message}")
        self.kind, self.message, self.node = kind, message.strip(), node


@dataclass(frozen=True)
class Output:
    """An output of a node in a graph."""

    node: str
    index: int

    def __getitem__(self, index: int) -> "Output":
        return Output(self.node, index)


@dataclass
class Graph:
    """A workflow in ComfyUI's API format, written as calls."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, class_type: str, **inputs: Any) -> Output:
        name = str(len(self.nodes) + 1)
        wired = {
            key: [value.node, value.index] if isinstance(value, Output) else value for key, value in inputs.items()
        }
        self.nodes[name] = {"class_type": class_type, "inputs": wired}
        return Output(name, 0)

    def save(self, latent: Output, name: str) -> None:
        """Keep a LATENT under `name` for `Run.latents`."""
        self("SaveLatent", samples=latent, filename_prefix=name)


@dataclass(frozen=True)
class Run:
    """What a workflow left: its history entry, and the latents it saved by their names."""

    history: dict[str, Any]
    latents: dict[str, Tensor]
    seconds: float


class ComfyUI:
    """One ComfyUI in a folder of its own.

    COMFYUI_DIR is its source, COMFYUI_PYTHON the interpreter that has its requirements (by default this one),
    COMFYUI_PYTHONPATH what that interpreter should find besides.

    Args:
        base: where input, output, user settings and the link to this repository go.
        models: a folder with checkpoints, loras, embeddings, controlnet, vae.
        environment: LUNA_INFERENCE and the like.
        nodes: the clone of this repository among its custom nodes.
    """

    def __init__(self, base: Path, models: Path, environment: Mapping[str, str], nodes: Path = ROOT) -> None:
        self.base = base
        self.port = _free_port()
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / "LunaServe").symlink_to(nodes, target_is_directory=True)
        (base / "custom_nodes" / "patching_nodes.py").symlink_to(Path(__file__).with_name("patching_nodes.py"))
        kinds = ("checkpoints", "loras", "embeddings", "controlnet", "vae")
        paths = {"tests": {"base_path": str(models), **{kind: kind for kind in kinds}}}
        (base / "paths.yaml").write_text(json.dumps(paths))
        self.log = base / "comfyui.log"
        self._environment = os.environ | environment | {"PYTHONPATH": os.environ.get("COMFYUI_PYTHONPATH", "")}
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "ComfyUI":
        source = Path(os.environ["COMFYUI_DIR"])
        command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu"]
        command += ["--use-pytorch-cross-attention", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--extra-model-paths-config", str(self.base / "paths.yaml")]
        # The server computes text encoders in fp32; with them in fp16 here, LoRA would be rounded to that.
        command += ["--disable-api-nodes", "--fp32-text-enc"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=source,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                self.get("/system_stats")
                return self
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.3)
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *_) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait(30)

    def wait_for_step(self) -> None:
        """Until the sampler has made a step, which its progress bar writes to the log."""
        made = self._steps()
        deadline = time.monotonic() + 300  # its models may have to be loaded first
        while time.monotonic() < deadline:
            if self._steps() > made:
                return
            time.sleep(0.05)
        raise TimeoutError("the sampler made no step")

    def _steps(self) -> int:
        return len(re.findall(r"\d(?:it/s|s/it)\]", self.log.read_text(errors="replace")))

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self._process.pid)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def start(self, graph: Graph) -> str:
        """Queue a workflow and return its id.

        Raises:
            RunFailed: ComfyUI refuses it.
        """
        try:
            return self.post("/prompt", {"prompt": graph.nodes})["prompt_id"]
        except urllib.error.HTTPError as error:
            told = json.load(error)
            raise RunFailed(told["error"]["type"], json.dumps(told), "validation") from error

    def wait(self, prompt: str, seconds: float = 300) -> Run:
        """The outcome of a queued workflow.

        Raises:
            RunFailed: it ended in an error or was interrupted.
        """
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            history = self.get(f"/history/{prompt}").get(prompt)
            if history:
                return self._outcome(history, time.monotonic() - started)
            time.sleep(0.05)
        raise TimeoutError(f"no end after {seconds} s:\n{self.log.read_text()[-2000:]}")

    def run(self, graph: Graph, seconds: float = 300) -> Run:
        """Queue a workflow and wait for its end."""
        return self.wait(self.start(graph), seconds)

    def _outcome(self, history: dict[str, Any], seconds: float) -> Run:
        for kind, event in history["status"]["messages"]:
            if kind == "execution_error":
                raise RunFailed(event["exception_type"], event["exception_message"], event["node_type"])
            if kind == "execution_interrupted":
                raise RunFailed("interrupted", "", event["node_type"])
        latents = {}
        for output in history["outputs"].values():
            for saved in output.get("latents", []):
                file = self.base / "output" / saved["filename"]
                latents[saved["filename"].rsplit("_", 2)[0]] = load_file(file)["latent_tensor"]
        return Run(history, latents, seconds)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def scratch() -> tempfile.TemporaryDirectory:
    """A folder whose path is short enough for Unix sockets beneath it."""
    return tempfile.TemporaryDirectory(prefix="luna")
