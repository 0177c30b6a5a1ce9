"""How much memory the tests here take at most, so that they stay bearable beside other work."""

import os
import threading
from contextlib import suppress

import psutil

_EVERY_SECONDS = 2.0  # the kernel walks all page tables for one look: a tenth of a second


class MemoryWatch:
    """Looks at this process and all below it until `stop`.

    Attributes:
        peak: the largest sum of their PSS in bytes: a page that several share counts once.
        at: the test that ran then, and what each process held.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.at = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def __str__(self) -> str:
        return f"at most {self.peak / 1e9:.1f} GB: {self.at}"

    def _run(self) -> None:
        while not self._stopped.wait(_EVERY_SECONDS):
            held = _held()
            if sum(held) > self.peak:
                self.peak = sum(held)
                largest = ", ".join(f"{each / 1e9:.1f}" for each in sorted(held, reverse=True)[:4])
                self.at = f"{os.environ.get('PYTEST_CURRENT_TEST')}, {len(held)} processes, the largest {largest}"


def _held() -> list[int]:
    held = []
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended meanwhile
            held.append(process.memory_full_info().pss)
    return held
