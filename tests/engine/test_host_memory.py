import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTS = """
import resource, sys, torch
from engine.host_memory import keep_freed_memory

def rounds(count):
    for _ in range(count):
        some = [torch.ones(10 << 20) for _ in range(4)]  # 40 MiB each, which glibc by itself always maps
        del some

if sys.argv[1] == "kept":
    keep_freed_memory()
rounds(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that ten rounds of four 40 MiB tensors had mapped, after three rounds before."""
    done = subprocess.run([sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_a_step_takes_the_memory_that_the_last_one_freed():
    mallopt = "import ctypes; print(ctypes.CDLL(None).mallopt(-3, 64 << 20))"
    if subprocess.run([sys.executable, "-c", mallopt], capture_output=True, text=True).stdout != "1\n":
        pytest.skip("this glibc keeps nothing above 32 MiB")
    # Once or twice the tensors may come to lie elsewhere.
    assert faults("kept") < 0.4 * faults("given back")
