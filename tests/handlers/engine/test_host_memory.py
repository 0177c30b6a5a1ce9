import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FAULTS = """
import resource, sys, torch
from handlers.engine.host_memory import keep_freed_memory

def rounds(count):
    for _ in range(count):
        some = [torch.ones(6 << 20) for _ in range(4)]  # 24 MiB each
        del some

if sys.argv[1] == "kept":
    keep_freed_memory()
rounds(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that ten rounds of four 24 MiB tensors had mapped, after three rounds before."""
    done = subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_step_takes_the_memory_that_the_last_one_freed():
    assert faults("kept") < 100 < faults("given back")
