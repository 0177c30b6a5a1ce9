"""Kept-alive HTTP/1.1 connections to one address.

On http.client, because a sampler makes a call per step: the layers of urllib3 or requests around it cost 0.3 to 0.8 ms
each, more than everything else that a client does for a step.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage, HTTPSConnection
from urllib.parse import SplitResult

from luna_client.addresses import parsed

_PIECE = 1 << 20


@dataclass(frozen=True)
class Body:
    """What an HTTP request carries, or leads to: a message and its tensors, of `blob_bytes`. `fresh` makes the HTTP
    body, and is called for every attempt to send it."""

    content_type: str
    blob_bytes: int
    fresh: Callable[[], bytes | bytearray]


@dataclass(frozen=True)
class Answer:
    content_type: str
    body: bytes


@dataclass(frozen=True)
class Response:
    status: int
    headers: HTTPMessage
    data: bytes


class Connections:
    """Safe to share among threads.

    Args:
        address: http://host:port, or https, and a path before all others if there is one.
        connect: seconds to wait for a connection.
        idle: connections kept while nobody uses them.
    """

    def __init__(self, address: str, connect: float, idle: int = 8):
        self._address, self._connect = address, connect
        self._idle: deque[HTTPConnection] = deque(maxlen=idle)

    def exchange(
        self, method: str, path: str, headers: dict[str, str], body: bytes | bytearray, seconds: float
    ) -> Response:
        """One request and its whole answer, whatever its status; each piece of the answer may take `seconds`.

        Raises:
            Malformed: the address is none.
            NotConnected: nothing answers there.
            TimeoutError: no answer in time.
            ConnectionError, http.client.HTTPException: the connection broke, perhaps as it was kept for too long; all
                kept ones are dropped.
        """
        parts = parsed(self._address)
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._open(parts)
        try:
            connection.sock.settimeout(seconds)
            # A server may answer, and close, before it has read all of a body that is too large.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, parts.path + path, _pieces(body), headers)
            answer = connection.getresponse()
            response = Response(answer.status, answer.headers, answer.read())
        except BaseException:
            connection.close()
            self._idle.clear()
            raise
        if not answer.will_close:
            self._idle.append(connection)
        return response

    def _open(self, parts: SplitResult) -> HTTPConnection:
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self._connect)
        try:
            connection.connect()
        except (OSError, UnicodeError) as error:  # the latter of a host's name that is none
            raise NotConnected(str(error)) from error
        return connection


def _pieces(body: bytes | bytearray) -> Iterator[memoryview]:
    """One after the other, because a connection's time-out is for one piece, however large."""
    return (memoryview(body)[start : start + _PIECE] for start in range(0, len(body), _PIECE))


class NotConnected(OSError):
    """No connection could be made."""
