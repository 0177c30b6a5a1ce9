"""Has models loaded and shows on the console how that goes, and what came of it."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from luna_client.manager import Manager
from luna_protocol.errors import LunaError
from luna_protocol.messages import Index
from luna_protocol.model_names import with_version

# Models that start together: their workers are light, and wait in the engine's line for their turn to load.
AT_ONCE = 8


def load(
    server: Manager,
    models: Iterable[str],
    console: Console,
    workers: Mapping[str, int | None] | None = None,
) -> None:
    """Register the archives of these models, `AT_ONCE` at a time, and wait for their workers, showing how it goes.

    `workers` says how many a model gets, where that is not the number that its archive asks for.

    A model that TorchServe refuses, or whose workers are late, is told on the console, and the others go on.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:30}"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {model: progress.add_task(model, total=1, state="in line") for model in models}

        def start(model: str) -> None:
            def show(_model: str, ready: int, wanted: int) -> None:
                progress.update(tasks[model], completed=ready >= wanted, state=f"{ready} of {wanted} workers ready")

            try:
                server.load(model)
                if count := (workers or {}).get(model):
                    server.scale(model, count)
                server.wait_ready([with_version(model)], progress=show)
                # To TorchServe a worker is ready that answers everybody why its model did not load.
                with suppress(LunaError):
                    if any(worker.state == "failed" for worker in server.workers(model)):
                        progress.update(tasks[model], state="[red]failed")
            except LunaError as error:
                progress.update(tasks[model], completed=1, state="[red]not served")
                progress.console.print(f"[red]{model}: {escape(str(error))}")

        # UNets first: they are the largest.
        in_line = sorted(tasks, key=lambda model: ".unet" not in model)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            list(pool.map(start, in_line))
        finally:
            # Whoever interrupts this ends the server, and that ends these threads.
            pool.shutdown(wait=False, cancel_futures=True)


def overview(index: Index) -> Table:
    """What is served, one row a model and device."""
    table = Table("model", "family", "device", "dtype", "weights", "state", "workers", "file")
    for model in index.models:
        for worker in model.workers:
            device = worker.device
            if worker.assigned_gpu is not None and not device.startswith("cuda"):
                device += f" (assigned GPU {worker.assigned_gpu} is not there)"
            state = worker.state if worker.resident else "parked"
            state = state if worker.state != "failed" else f"[red]failed: {escape(worker.reason)}"
            weights = f"{worker.weights_bytes / 1e6:,.0f} MB"
            file = escape(model.checkpoint or "")
            table.add_row(model.name, model.family, device, worker.dtype, weights, state, str(worker.relays), file)
    return table
