"""How this project's origin sent its steps: length-prefixed pickle over a local TCP socket, a thread per connection.

Kept to be compared with, and the only place of the repository where anything is unpickled: both ends are this file, in
a process that the benchmark starts, on a loopback socket that closes with it. Never build on it: who can reach a socket
that unpickles can run code.
"""

import pickle
import socket
import subprocess
import sys
import threading
from typing import Any

from torch import Tensor

_LENGTH = 8


class Origin:
    """A server process that gives back x of what it is sent, and a connection to it."""

    def __enter__(self) -> "Origin":
        command = [sys.executable, "-m", "benchmarks.origin_way"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        port = int(self._process.stdout.readline())
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()
        self._process.stdin.close()
        self._process.wait(10)

    def step(self, tensors: dict[str, Tensor]) -> Tensor:
        _send(self._socket, tensors)
        return _receive(self._socket)


def _send(connection: socket.socket, value: Any) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    connection.sendall(len(data).to_bytes(_LENGTH, "little"))
    connection.sendall(data)


def _receive(connection: socket.socket) -> Any:
    return pickle.loads(_exactly(connection, int.from_bytes(_exactly(connection, _LENGTH), "little")))


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        received = connection.recv_into(view[done:])
        if not received:
            raise EOFError
        done += received
    return data


def _serve(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        while True:
            _send(connection, _receive(connection)["x"])
    except (EOFError, OSError):
        connection.close()


def _accept(listening: socket.socket) -> None:
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    threading.Thread(target=_accept, args=(listening,), daemon=True).start()
    sys.stdin.buffer.read()  # until the benchmark has gone
