"""How many bytes of weights each device may hold.

A budget covers weights alone. Activations, LoRA overlays and step caches live beside them, which is why a GPU's default
leaves a quarter free.
"""

import os
import re
from dataclasses import dataclass

from luna_protocol.errors import Malformed
from luna_protocol.messages import Worker

VARIABLE = "LUNA_MEMORY"
_DEFAULT_SHARE = 0.75
_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Budgets:
    """{device ("cpu", "0", "1" ...): bytes} as given; see `of` for the others."""

    given: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> "Budgets":
        """From `DEVICE=SIZE` pairs separated by commas, such as "0=20GB,cpu=8GiB".

        Raises:
            Malformed: naming the pair.
        """
        given = {}
        for pair in filter(None, map(str.strip, text.split(","))):
            match = re.fullmatch(r"(cpu|\d+)=(\d+(?:\.\d+)?)([MG]i?B)", pair, re.IGNORECASE)
            if match is None:
                raise Malformed(f"{pair!r} is no memory budget", "give DEVICE=SIZE such as 0=20GB, 1=500MiB or cpu=8GB")
            given[match[1].lower()] = int(float(match[2]) * _UNITS[match[3].upper()])
        return cls(given)

    @classmethod
    def from_environment(cls) -> "Budgets":
        return cls.parse(os.environ.get(VARIABLE, ""))

    def of(self, device: str, memory: int | None) -> int | None:
        """Bytes for weights on a device: as given, else three quarters of its `memory`; without that, as for a CPU, no
        bound."""
        if device in self.given:
            return self.given[device]
        return None if memory is None else int(memory * _DEFAULT_SHARE)


def device_key(worker: Worker) -> str:
    """The device a worker was assigned, also where it is not there: the number of a GPU, or "cpu"."""
    return "cpu" if worker.assigned_gpu is None else str(worker.assigned_gpu)


def gigabytes(size: int) -> str:
    """The size in words; in megabytes where it is less than a tenth of a gigabyte."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
