"""The engine's own door: frames on a local socket, for clients of the same machine and user.

A frame is a header in JSON and a body: 4 bytes with the header's length, 8 with the body's (little-endian), then the
two. A connection carries one request at a time and its reply. The body is what an HTTP request to TorchServe would
carry, so a tensor lies in the client's shared memory, or in the body as a blob.

An address is the path of a Unix socket, which only its owner can open; or `HOST:PORT SECRET` where there are none
(Windows): a loopback port, and what a client has to say first. The secret is new for each engine.
"""

import hmac
import json
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from luna_protocol.errors import Malformed

MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 32
_SECRET_BYTES = 32
_UNIX = hasattr(socket, "AF_UNIX") and os.name == "posix"


def listen(folder: Path, unix: bool = _UNIX) -> tuple[socket.socket, str]:
    """A listening socket and its address; a Unix socket lies in `folder`, which has to be private to its owner."""
    if unix:
        path = folder / "door"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(128)
        return listening, str(path)
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    return listening, f"127.0.0.1:{listening.getsockname()[1]} {secrets.token_hex(_SECRET_BYTES)}"


def connect(address: str, timeout: float | None = None) -> "Connection":
    """A connection to the door at `address`.

    Raises:
        OSError: nobody is there.
    """
    place, _, secret = address.partition(" ")
    if not secret:
        if not _UNIX:
            raise ConnectionRefusedError(f"this system cannot open {address}")
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(timeout)
        connected.connect(address)
        return Connection(connected)
    host, _, port = place.rpartition(":")
    connected = socket.create_connection((host, int(port)), timeout)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.sendall(bytes.fromhex(secret))
    return Connection(connected)


def accept(listening: socket.socket, address: str) -> "Connection | None":
    """The next client; None for one that does not know the secret."""
    accepted, _ = listening.accept()
    secret = address.partition(" ")[2]
    if secret:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        accepted.settimeout(5)  # seconds for a handshake that is one packet
        connection = Connection(accepted)
        with suppress(OSError, EOFError):
            if hmac.compare_digest(connection.read(_SECRET_BYTES), bytes.fromhex(secret)):
                accepted.settimeout(None)
                return connection
        connection.close()
        return None
    return Connection(accepted)


class Connection:
    """One end of a connection; for one thread at a time, but for `abort` and `is_gone`."""

    def __init__(self, connected: socket.socket):
        self._socket = connected

    def send(self, header: dict[str, Any], body: bytes | bytearray | memoryview = b"") -> None:
        text = json.dumps(header).encode()
        sizes = len(text).to_bytes(4, "little") + len(body).to_bytes(8, "little")
        if len(body) < 4096:
            self._socket.sendall(b"".join((sizes, text, body)))
        else:
            self._socket.sendall(sizes + text)
            self._socket.sendall(body)

    def receive(self, seconds: float | None = None) -> tuple[dict[str, Any], bytearray]:
        """The other end's next frame.

        Args:
            seconds: to wait for each piece of it; None for as long as it takes.

        Raises:
            TimeoutError: it did not come.
            EOFError: the other end has gone.
            OSError: the connection broke.
            Malformed: that was no frame.
        """
        self._socket.settimeout(seconds)
        sizes = self.read(12)
        header, body = int.from_bytes(sizes[:4], "little"), int.from_bytes(sizes[4:], "little")
        if header > MAX_HEADER_BYTES or body > MAX_BODY_BYTES:
            raise Malformed(f"a frame of {header} and {body} bytes", "see luna_protocol/door.py")
        try:
            fields = json.loads(self.read(header))
        except (ValueError, RecursionError) as error:
            raise Malformed(f"a frame's header is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise Malformed("a frame's header is not an object")
        return fields, self.read(body)

    def read(self, size: int) -> bytearray:
        """Exactly `size` bytes.

        Raises:
            EOFError, OSError: as in `receive`.
        """
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            received = self._socket.recv_into(view[done:])
            if not received:
                raise EOFError("the other end has gone")
            done += received
        return data

    def is_gone(self, seconds: float = 0.0) -> bool:
        """Whether the other end has closed, or does within `seconds`: it says nothing while it waits for a reply."""
        self._socket.settimeout(seconds)
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, TimeoutError):
            return False
        except OSError:
            return True
        finally:
            self._socket.settimeout(None)

    def abort(self) -> None:
        """Ends what another thread waits for at this connection, here and at the other end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
