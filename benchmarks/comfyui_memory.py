"""Memory of several ComfyUIs that share one server, against the same number that load the checkpoint themselves.

Needs COMFYUI_DIR (and COMFYUI_PYTHON). Every ComfyUI paints one picture and stays; then the proportional set sizes of
all processes are summed (PSS: memory shared by n processes counts 1/n in each). The checkpoint is small, so look at the
difference between the sums and at the weights, which appear once with a server and once a ComfyUI without.

    python -m benchmarks.comfyui_memory --instances 3
"""

import argparse
import json
import os
from contextlib import ExitStack
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from comfy_client.server import Server
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
        own, own_weights = _separate(instances, models, Path(folder) / "own")
        shared, server, shared_weights = _with_server(instances, models, file, Path(folder) / "shared")
    _tell(instances, own, own_weights, shared, server, shared_weights)


def _separate(instances: int, models: Path, base: Path) -> tuple[list[float], int]:
    with ExitStack() as stack:
        comfyuis = [stack.enter_context(ComfyUI(base / str(i), models, {})) for i in range(instances)]
        for comfyui in comfyuis:
            _paint(comfyui, local)
        return [_pss(comfyui.process) for comfyui in comfyuis], _weights(models) * instances


def _with_server(instances: int, models: Path, file: Path, home: Path) -> tuple[list[float], float, int]:
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
        comfyuis = [stack.enter_context(ComfyUI(home / str(i), models, told)) for i in range(instances)]
        for comfyui in comfyuis:
            _paint(comfyui, remote)
        workers = [worker for model in server.index().models for worker in model.workers]
        java = psutil.Process(workers[0].pid).parent()
        served = sum(_pss(process) for process in [java, *java.children(recursive=True)])
        weights = sum(worker.weights_bytes for worker in workers)
        return [_pss(comfyui.process) for comfyui in comfyuis], served, weights


def _paint(comfyui: ComfyUI, load) -> None:
    g = Graph()
    model, clip, vae = load(g, CHECKPOINT)
    latent = sample(g, model, encode(g, clip), empty(g))
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=vae), filename_prefix="picture")
    comfyui.run(g, 600)


def _pss(process: psutil.Process) -> float:
    """Megabytes."""
    return process.memory_full_info().pss / 1e6


def _weights(models: Path) -> int:
    return (models / "checkpoints" / CHECKPOINT).stat().st_size


def _tell(
    instances: int, own: list[float], own_weights: int, shared: list[float], server: float, shared_weights: int
) -> None:
    table = Table("", "each ComfyUI", "server", "sum of PSS", "weights", title=f"{instances} ComfyUIs, megabytes")
    rows = (("separate", own, 0.0, own_weights), ("one server", shared, server, shared_weights))
    for name, each, served, weights in rows:
        told = ", ".join(f"{size:,.0f}" for size in each)
        table.add_row(name, told, f"{served:,.0f}", f"{sum(each) + served:,.0f}", f"{weights / 1e6:,.0f}")
    Console().print(table)
    result = {
        "instances": instances,
        "separate_mb": round(sum(own)),
        "shared_mb": round(sum(shared) + server),
        "separate_each_mb": round(sum(own) / instances),
        "shared_each_mb": round(sum(shared) / instances),
        "server_mb": round(server),
        "separate_weights_mb": round(own_weights / 1e6),
        "shared_weights_mb": round(shared_weights / 1e6),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
