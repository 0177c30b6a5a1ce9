"""Engines' own doors: the short way to a model for clients of its machine, past HTTP and Java."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from luna_client.connections import Body, Response
from luna_client.faults import Aborted
from luna_protocol import JSON
from luna_protocol.door import Connection, connect
from luna_protocol.errors import EngineEnded, LunaError, NotLoaded, from_json
from luna_protocol.messages import Index

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 5.0
_IDLE = 8  # connections kept for each door


class Doors:
    """Safe to share among threads.

    Args:
        client: the name under which this client takes its turns.
        seconds: to wait for an answer.
    """

    def __init__(self, client: str, seconds: float) -> None:
        self._client = client
        self._seconds = seconds
        self._addresses: dict[str, str] = {}
        self._looked: dict[str, float] = {}
        self._idle: dict[str, deque[Connection]] = {}
        self._calling: dict[int, Connection] = {}

    def exchange(self, model: str, body: Body, index: Callable[[], Index]) -> Response | None:
        """The answer of a model that is loaded behind a door of this machine; None if there is none.

        Args:
            index: asks the server where its doors are.

        Raises:
            TimeoutError: no answer in time.
            EngineEnded: it may have been this request that ended it.
            Aborted: by another thread.
        """
        address = self._addresses.get(model) or self._find(model, index)
        if address is None:
            return None
        sent = body.fresh()
        header = {"op": "predict", "model": model, "client": self._client, "json": body.content_type == JSON}
        try:
            connection = self._connection(address)
        except OSError as error:
            log.info("the door of %s is closed: %s", model, error)
            self._forget(address)
            return None
        self._calling[threading.get_ident()] = connection
        try:
            connection.send(header, sent)
            told, answer = connection.receive(self._seconds)
        except TimeoutError:
            connection.close()
            raise
        except (OSError, EOFError, LunaError) as error:
            connection.close()
            if threading.get_ident() not in self._calling:
                raise Aborted(f"the call of {model} was aborted") from error
            self._forget(address)
            raise EngineEnded(f"the engine of {model} ended on this request", "see its log", 0.5) from error
        finally:
            self._calling.pop(threading.get_ident(), None)
        self._idle.setdefault(address, deque(maxlen=_IDLE)).append(connection)
        if told["status"] == NotLoaded.status and isinstance(from_json(answer), NotLoaded):
            self._forget(address)
            return None
        return Response(told["status"], _headers(told), answer)

    def abort(self, thread: int) -> None:
        """Ends the call of another thread, here and in the engine."""
        if connection := self._calling.pop(thread, None):
            connection.abort()

    def _find(self, model: str, index: Callable[[], Index]) -> str | None:
        now = time.monotonic()
        if now - self._looked.get(model, -_LOOK_AGAIN_SECONDS) < _LOOK_AGAIN_SECONDS:
            return None
        self._looked[model] = now
        try:
            models = index().models
        except (LunaError, ValueError):  # the other way says what is wrong
            return None
        for served in models:
            doors = [worker.door for worker in served.workers if worker.door and worker.state == "ready"]
            if doors:
                self._addresses[served.name] = doors[0]
        return self._addresses.get(model)

    def _connection(self, address: str) -> Connection:
        try:
            return self._idle[address].pop()
        except (KeyError, IndexError):
            return connect(address, _CONNECT_SECONDS)

    def _forget(self, address: str) -> None:
        self._addresses = {model: each for model, each in self._addresses.items() if each != address}
        self._idle.pop(address, None)


def _headers(told: Mapping[str, object]) -> dict[str, str]:
    headers = {"Content-Type": str(told["content_type"])}
    if told.get("retry_after") is not None:
        headers["Retry-After"] = str(max(1, round(float(told["retry_after"]))))
    return headers
