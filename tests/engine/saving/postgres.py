"""A PostgreSQL server of the tests' own, in a temporary folder, on a free port of the loopback."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Starts it and gives its SQLAlchemy URL; skips the test where PostgreSQL is not installed or cannot be started."""
    user = _unprivileged_user()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        if user:
            shutil.chown(folder, user)
        run = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        data = folder / "data"
        made = subprocess.run([_program("initdb"), "-D", data, "-U", "luna", "-A", "trust", "-E", "UTF8", "-N"], **run)
        if made.returncode:
            pytest.skip(f"initdb does not run here: {made.stderr.decode()[-300:]}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [_program("postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder]
        server = subprocess.Popen(command, **run | {"stderr": subprocess.DEVNULL})
        try:
            _wait_for(port, server)
            yield f"postgresql+psycopg://luna@127.0.0.1:{port}/postgres"
        finally:
            # Which does not wait for clients, as SIGTERM does.
            server.send_signal(signal.SIGINT) if os.name == "posix" else server.terminate()
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str:
    """Debian keeps them out of the path."""
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed (Debian: apt install postgresql)")
    return found


def _unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root: its package has made a user for that."""
    if os.name == "nt" or os.geteuid() != 0:
        return None
    import pwd

    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        pytest.skip("root may not run PostgreSQL, and there is no user postgres to run it")


def _wait_for(port: int, server: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    pytest.skip(f"PostgreSQL did not start (status {server.poll()})")
