"""Watch a running server: devices, memory, models, workers, requests, latency, cache, LoRA and the decode queue."""

import _environment

_environment.ensure()

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from luna_client.manager import Manager
from luna_protocol.errors import LunaError
from luna_protocol.messages import Index
from serving.loading import overview
from serving.measurements import Gpu, GpuLog, Metrics, gpus
from serving.stopping import Stopped, stop_on_signals

# (what is shown, metric) of counters; those of the decode queue and of caches appear once there was something to count.
COUNTERS = (
    ("step cache hits", "StepCacheHits"),
    ("step cache misses", "StepCacheMisses"),
    ("seconds saved by it", "StepCacheSecondsSaved"),
    ("LoRA merges", "LoraMerges"),
    ("LoRA overlays found", "LoraOverlayHits"),
    ("bytes of overlays", "LoraOverlayBytes"),
    ("decode jobs waiting", "DecodeQueueQueuedJobs"),
    ("decode jobs done", "DecodeQueueDoneJobs"),
    ("decode jobs given up", "DecodeQueueDeadJobs"),
)


def devices(found: list[Gpu]) -> Table:
    table = Table("device", "used", "of", "")
    for gpu in found:
        table.add_row(
            f"GPU {gpu.number}", f"{gpu.used / 1e9:.1f} GB", f"{gpu.total / 1e9:.1f} GB", f"{gpu.percent:.0f} %"
        )
    if not found:
        table.add_row("no GPU", "", "", "")
    return table


def traffic(index: Index, metrics: Metrics, before: Metrics | None, seconds: float) -> Table:
    """One row a loaded model; rates are those since `before`."""
    table = Table("model", "requests", "per second", "failed", "mean run", "mean batch", "memory")
    for model in index.models:
        if not model.workers:
            continue
        label = {"ModelName": model.name.split("/")[0]}
        requests = metrics.total("LunaRequests", **label)
        rate = (requests - before.total("LunaRequests", **label)) / seconds if before else 0
        run, batch = metrics.mean("LunaRunSeconds", **label), metrics.mean("LunaBatchSize", **label)
        table.add_row(
            model.name,
            f"{requests:.0f}",
            f"{rate:.1f}",
            f"{requests - metrics.total('LunaRequests', Outcome='ok', **label):.0f}",
            "" if run is None else f"{run * 1000:.1f} ms",
            "" if batch is None else f"{batch:.2f}",
            f"{metrics.total('LunaMemoryBytes', **label) / 1e9:.2f} GB",
        )
    return table


def counters(metrics: Metrics) -> Table:
    table = Table("counted", "since the start")
    for told, name in COUNTERS:
        if name in metrics.names():
            table.add_row(told, f"{metrics.total(name):,.0f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080, help="of the server, as given to serve.py (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2, help="between readings (%(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the GPUs' memory there too")
    parser.add_argument("--once", action="store_true", help="show one reading and end")
    arguments = parser.parse_args()
    host, port = "http://127.0.0.1", arguments.port
    server = Manager(f"{host}:{port}", f"{host}:{port + 1}")
    console = Console()
    stop_on_signals()
    log = arguments.csv.open("w", newline="", encoding="utf-8", buffering=1) if arguments.csv else None
    gpu_log = GpuLog(log, gpus()) if log else None
    before, then = None, 0.0
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                found, index, metrics = gpus(), server.index(), Metrics.read(f"{host}:{port + 2}")
                now = time.monotonic()
                shown = [
                    devices(found),
                    overview(index),
                    traffic(index, metrics, before, now - then),
                    counters(metrics),
                ]
                live.update(Group(*shown), refresh=True)
                if gpu_log:
                    gpu_log.add(found)
                if arguments.once:
                    return 0
                before, then = metrics, now
                time.sleep(arguments.seconds)
    except Stopped:
        return 0
    except LunaError as error:
        console.print(f"[red]{error}")
        return 1
    finally:
        if log:
            log.close()


if __name__ == "__main__":
    sys.exit(main())
