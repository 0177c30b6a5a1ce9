"""Memory of several ComfyUIs that share one server, against the same number that load the checkpoint themselves.

Needs COMFYUI_DIR (and COMFYUI_PYTHON). Every ComfyUI paints one picture and stays; then the proportional set sizes of
all processes are summed (PSS: memory shared by n processes counts 1/n in each). The checkpoint is small, so look at the
difference between the sums and at the weights, counted in each process: once with a server, once a ComfyUI without.

    python -m benchmarks.comfyui_memory --instances 3
"""

import argparse
import json
import os
import shutil
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from luna_client.server import Server
from serving.archives import pack_checkpoint, pack_repository
from serving.torchserve import Ports, TorchServe
from tests import checkpoints
from tests.comfyui.comfyui import ComfyUI, Graph, scratch
from tests.comfyui.workflows import empty, encode, local, remote, sample

CHECKPOINT = "sd15.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=3)
    instances = parser.parse_args().instances
    os.environ["OMP_NUM_THREADS"] = "1"
    with scratch() as folder:
        models = Path(folder) / "models"
        file = checkpoints.write(models / "checkpoints" / CHECKPOINT, "sd15", checkpoints.DTYPES["fp32"])
        os.environ["LUNA_CHECKPOINTS"] = str(models / "checkpoints")
        own = _separate(instances, models, Path(folder) / "own")
        shared, server = _with_server(instances, models, file, Path(folder) / "shared")
    _tell(instances, own, shared, server)


@dataclass(frozen=True)
class Process:
    """In megabytes: the proportional set size, and the weights of it."""

    pss: float
    weights: float


def _separate(instances: int, models: Path, base: Path) -> list[Process]:
    with ExitStack() as stack:
        return _measured([_start(stack, base / str(i), models, {}) for i in range(instances)], local)


def _with_server(instances: int, models: Path, file: Path, home: Path) -> tuple[list[Process], Process]:
    store = home / "model_store"
    pack_repository(store, home)
    names = ["repository", *(archive.model for archive in pack_checkpoint(file, store, home=home))]
    with ExitStack() as stack:
        torchserve = stack.enter_context(TorchServe(store, home / "run", Ports.free()))
        server = Server(torchserve.inference, torchserve.management, torchserve.key_file)
        for name in names:
            server.register(f"{name}.mar")
            server.wait_ready([name])
        told = {
            "LUNA_INFERENCE": torchserve.inference,
            "LUNA_MANAGEMENT": torchserve.management,
            "LUNA_TOKEN_FILE": str(torchserve.key_file),
        }
        shared = _measured([_start(stack, home / str(i), models, told) for i in range(instances)], remote)
        workers = [worker for model in server.index().models for worker in model.workers]
        pss = sum(map(_pss, psutil.Process(torchserve._guard.pid).children(recursive=True)))
        return shared, Process(pss, sum(worker.weights_bytes for worker in workers) / 1e6)


def _start(stack: ExitStack, base: Path, models: Path, environment: dict[str, str]) -> ComfyUI:
    comfyui = ComfyUI(base, models, environment)
    shutil.copy(Path(__file__).with_name("weights_held.py"), base / "custom_nodes")
    return stack.enter_context(comfyui)


def _measured(comfyuis: list[ComfyUI], load) -> list[Process]:
    weights = [_paint(comfyui, load) for comfyui in comfyuis]
    return [Process(_pss(each.process), held) for each, held in zip(comfyuis, weights, strict=True)]


def _paint(comfyui: ComfyUI, load) -> float:
    """Megabytes of weights that the process holds after a picture."""
    g = Graph()
    model, clip, vae = load(g, CHECKPOINT)
    latent = sample(g, model, encode(g, clip), empty(g))
    picture = g("VAEDecode", samples=latent, vae=vae)
    g("SaveImage", images=picture, filename_prefix="picture")
    counted = g("WeightsHeld", after=picture)
    return comfyui.run(g, 600).history["outputs"][counted.node]["text"][0] / 1e6


def _pss(process: psutil.Process) -> float:
    """Megabytes."""
    return process.memory_full_info().pss / 1e6


def _tell(instances: int, own: list[Process], shared: list[Process], server: Process) -> None:
    table = Table("", "each ComfyUI", "of it weights", "server", "of it weights", "sum", "of it weights")
    table.title = f"{instances} ComfyUIs, megabytes of PSS"
    for name, each, served in (("separate", own, Process(0, 0)), ("one server", shared, server)):
        told = (", ".join(f"{value:,.0f}" for value in values) for values in zip(*map(astuple, each), strict=True))
        pss, weights = _sum([*each, served])
        table.add_row(name, *told, *(f"{value:,.0f}" for value in (*astuple(served), pss, weights)))
    Console(width=120).print(table)
    result = {
        "instances": instances,
        "separate": [asdict(each) for each in own],
        "shared": [asdict(each) for each in shared],
        "server": asdict(server),
        "separate_sum_mb": round(_sum(own)[0]),
        "shared_sum_mb": round(_sum([*shared, server])[0]),
    }
    print(json.dumps(result))


def _sum(processes: list[Process]) -> tuple[float, float]:
    return sum(each.pss for each in processes), sum(each.weights for each in processes)


if __name__ == "__main__":
    main()
