"""Figures of a running server: what GET /metrics answers, and the memory of its GPUs."""

import csv
import shutil
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TextIO

import urllib3
from prometheus_client.parser import text_string_to_metric_families

from luna_client.faults import Unreachable


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes, of all processes."""

    number: int
    used: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.used / self.total


def gpus() -> list[Gpu]:
    """The GPUs of this machine, as nvidia-smi numbers them; none without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(table: str) -> list[Gpu]:
    """From nvidia-smi's rows of `index, used MiB, total MiB`; those of GPUs that do not tell are left out."""
    rows = (line.split(",") for line in table.splitlines())
    told = ([field.strip() for field in row] for row in rows)
    return [
        Gpu(int(number), int(used) << 20, int(total) << 20)
        for number, used, total in told
        if used.isdecimal() and total.isdecimal()
    ]


class GpuLog:
    """A row a reading: timestamp, elapsed_sec and, of each GPU, gpuN_ used_gb, total_gb, percent, used_mb, free_mb."""

    def __init__(self, file: TextIO, found: list[Gpu]) -> None:
        kinds = ("used_gb", "total_gb", "percent", "used_mb", "free_mb")
        self._writer = csv.writer(file)
        self._writer.writerow(
            ["timestamp", "elapsed_sec", *(f"gpu{gpu.number}_{kind}" for gpu in found for kind in kinds)]
        )
        self._begun = time.monotonic()

    def add(self, found: list[Gpu]) -> None:
        row: list[str] = [datetime.now().isoformat(timespec="seconds"), f"{time.monotonic() - self._begun:.1f}"]
        for gpu in found:
            row += [f"{gpu.used / (1 << 30):.2f}", f"{gpu.total / (1 << 30):.2f}", f"{gpu.percent:.1f}"]
            row += [f"{gpu.used >> 20}", f"{(gpu.total - gpu.used) >> 20}"]
        self._writer.writerow(row)


class Metrics:
    """One reading of a server's Prometheus metrics."""

    def __init__(self, text: str) -> None:
        # The parser appends _total to counters that lack it, as TorchServe's do.
        self._samples = [
            (sample.name.removesuffix("_total"), sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    @classmethod
    def read(cls, address: str) -> "Metrics":
        """
        Raises:
            Unreachable: nothing answers there.
        """
        try:
            return cls(urllib3.request("GET", f"{address}/metrics", timeout=5, retries=False).data.decode())
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f"no metrics at {address}: {error}", "serve.py prints their address") from error

    def names(self) -> set[str]:
        """Of all samples; counters without their _total."""
        return {name for name, _, _ in self._samples}

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name with these labels; 0 if there is none yet."""
        return sum(
            value for found, theirs, value in self._samples if found == name and labels.items() <= theirs.items()
        )

    def mean(self, histogram: str, **labels: str) -> float | None:
        """The mean of what a histogram observed, or None if that is nothing yet."""
        count = self.total(f"{histogram}_count", **labels)
        return self.total(f"{histogram}_sum", **labels) / count if count else None
