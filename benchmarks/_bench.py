"""What the benchmarks share: a server of their own, fair turns, and the way results are shown."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from handlers.engine_link import PACKAGES
from luna_client.server import Server
from serving.archives import pack_repository
from serving.torchserve import ROOT, Ports, TorchServe


def arguments(description: str, svg: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    if svg:
        parser.add_argument("--svg", type=Path, help="draw the result into this file")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and smaller models: under a minute")
    # One thread each, so that what is compared shares the cores fairly. Children inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    return parser.parse_args()


@contextmanager
def scratch_home() -> Iterator[Path]:
    """A LunaServe home that nothing of the surroundings leaks into, and that is removed."""
    for name in [name for name in os.environ if name.startswith("LUNA_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(prefix="luna-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def serving(home: Path, models: list[str]) -> Iterator[tuple[TorchServe, Server]]:
    """A server on free ports with these models of home/model_store loaded."""
    pack_repository(home / "model_store", home)
    models = ["repository", *models]
    with TorchServe(home / "model_store", home / "run", Ports.free()) as torchserve:
        server = connect(torchserve)
        for model in models:
            server.register(f"{model}.mar")
        server.wait_ready(models)
        yield torchserve, server


def connect(torchserve: TorchServe, doors: bool = True) -> Server:
    return Server(torchserve.inference, torchserve.management, torchserve.key_file, doors=doors)


def pack_unet(home: Path, model: str, role: Path, config: dict[str, Any]) -> str:
    """Pack a UNet whose role is a benchmark's own, a file that finds ours as `engine.roles.ours`; returns the
    model's name."""
    ours = ROOT / "engine" / "roles" / "unet.py"
    swapped = {"engine/roles/unet.py": role, "engine/roles/ours.py": ours}
    return pack_handler(home, model, ROOT / "handlers" / "relay.py", config, swapped)


def pack_handler(
    home: Path, model: str, handler: Path, config: dict[str, Any], swapped: Mapping[str, Path] | None = None
) -> str:
    """Pack a handler with our packages, files of them `swapped`, and a model-config.yaml; returns the model's name."""
    store = home / "model_store"
    store.mkdir(parents=True, exist_ok=True)
    manifest = {"modelName": model, "modelVersion": "1.0", "handler": handler.name, "configFile": "model-config.yaml"}
    with zipfile.ZipFile(store / f"{model}.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": manifest, "runtime": "python"}))
        archive.writestr("model-config.yaml", yaml.safe_dump(config))
        archive.write(handler, handler.name)
        files = {file.relative_to(ROOT).as_posix(): file for name in PACKAGES for file in (ROOT / name).rglob("*.py")}
        for name, file in (files | dict(swapped or {})).items():
            archive.write(file, name)
    return model


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int, calls: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each call of each way. The ways take turns of `calls` calls, there and back, so that what else the
    machine does, and what one leaves in the caches for the next, hits all of them alike."""
    for way in ways.values():
        for _ in range(warm_up):
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in list(ways.items())[:: -1 if number % 2 else 1]:
            for _ in range(calls):
                begun = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def p99_ms(seconds: list[float]) -> float:
    return sorted(seconds)[int(len(seconds) * 0.99)] * 1e3


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=110).print(table)


def conclude(result: dict[str, Any]) -> None:
    """The line of JSON that comes last; numbers to four digits."""
    print(json.dumps(_rounded(result)))
    sys.stdout.flush()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
