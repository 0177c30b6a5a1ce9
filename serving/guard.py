"""Runs a command and ends it, with all it started, once the process that started the guard is gone.

    python -m serving.guard SCRATCH COMMAND...

The guard reads its standard input, which nobody writes to. However its parent ends (return, exception, signal, SIGKILL,
closed terminal), the operating system closes the pipe, the read returns, and the guard ends the command and removes
SCRATCH. What it cannot cover is a SIGKILL of the guard itself.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import psutil

GRACE_SECONDS = 10


def end(process: psutil.Popen) -> None:
    """Ask the process to stop, then kill what is left of it and of everything it started."""
    descendants = process.children(recursive=True) if process.is_running() else []
    with suppress(psutil.NoSuchProcess):
        process.terminate()
    psutil.wait_procs([process], timeout=GRACE_SECONDS)
    # Not before it has gone, or it would start its workers again. Engines would wait for others to hold their models.
    for descendant in descendants:
        with suppress(psutil.NoSuchProcess):
            descendant.terminate()
    psutil.wait_procs(descendants, timeout=GRACE_SECONDS)
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for descendant in descendants:
        with suppress(psutil.NoSuchProcess):
            descendant.kill()
    psutil.wait_procs(descendants, timeout=GRACE_SECONDS)


def main(scratch: str, command: list[str]) -> int:
    # A Ctrl-C or a service manager's SIGTERM may reach every process at once; the guard has to outlive the others to
    # clean up. Not SIG_IGN, because the command would inherit that.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    process = psutil.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    parent_gone = threading.Event()

    def wait_for_parent() -> None:
        # Not by sys.stdin: a thread that reads it when the interpreter ends aborts the process.
        while os.read(0, 4096):
            pass
        parent_gone.set()
        end(process)

    watcher = threading.Thread(target=wait_for_parent, daemon=True)
    watcher.start()
    status = process.wait()
    if parent_gone.is_set():
        watcher.join()
    else:
        end(process)
    shutil.rmtree(scratch, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
