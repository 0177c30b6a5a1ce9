"""The engine's door: a thread per connection, each with one request at a time.

A header says what is wanted ("op"):

- predict: {"model", "client", "json"}; the body is a request as TorchServe would get it, JSON where "json" says so. The
  reply's header is {"status", "content_type", "reason", "retry_after"}, its body that of the answer.
- hold: {"key", "model", "settings", "seconds", "failure"}; the model is loaded, and stays for as long as the connection
  does.
  The replies are {"state": "loading"}, when its turn has come, and {"state", "reason"} in the end; from then on
  {"metrics": [...]} comes now and then.
- status: the reply's header is {"models": {name: its Worker}}.
"""

import hmac
import json
import logging
import socket
import threading
from contextlib import suppress
from typing import Any

from engine.engine import Engine
from luna_protocol import JSON
from luna_protocol.door import Connection, accept
from luna_protocol.errors import LunaError, Malformed

log = logging.getLogger(__name__)

_METRICS_EVERY = 1.0  # seconds


class Door:
    """Answers at a listening socket of `address` until the process ends.

    Args:
        key: who holds a model has to say it: its settings name files, and clients may not.
    """

    def __init__(self, engine: Engine, listening: socket.socket, address: str, key: str):
        self.address = address
        self._key = key
        self._engine = engine
        self._listening = listening
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = accept(self._listening, self.address)
            except OSError:
                log.exception("a client could not come in")
                continue
            if connection:
                threading.Thread(target=self._serve, args=(connection,), name="client", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        operations = {"predict": self._predict, "hold": self._hold, "status": self._status}
        try:
            while True:
                header, body = connection.receive()
                operation = operations.get(header.get("op"))
                if operation is None:
                    raise Malformed(f"unknown op {str(header.get('op'))[:80]!r}", f"known are {', '.join(operations)}")
                operation(connection, header, body)
        except (EOFError, OSError):
            pass
        except LunaError as error:
            _send_error(connection, error)
        except Exception as error:
            log.exception("a client's request could not be read")
            _send_error(connection, Malformed(f"{type(error).__name__}: {error}"))
        finally:
            connection.close()

    def _predict(self, connection: Connection, header: dict[str, Any], body: bytearray) -> None:
        try:
            request = json.loads(body) if header.get("json") and body else body
        except (ValueError, RecursionError) as error:
            _send_error(connection, Malformed(f"the request is not JSON: {error}"))
            return
        answer = self._engine.predict(str(header["model"]), request, str(header.get("client", "")), connection.is_gone)
        told = {"status": answer.status, "content_type": answer.content_type, "reason": answer.reason}
        connection.send(told | {"retry_after": answer.retry_after}, answer.body)

    def _hold(self, connection: Connection, header: dict[str, Any], _body: bytearray) -> None:
        if not hmac.compare_digest(str(header.get("key", "")), self._key):
            raise Malformed("only relays hold models", "their key is in the engine's record")
        holder = object()
        model = self._engine.hold(
            str(header["model"]),
            header["settings"],
            holder,
            float(header["seconds"]),
            header.get("failure", ""),
            lambda: _send(connection, {"state": "loading"}),
        )
        try:
            connection.send({"state": model.worker.state, "reason": model.worker.reason})
            while not connection.is_gone(_METRICS_EVERY):
                if model.holders[:1] == [holder] and (metrics := model.telemetry.collect()):
                    connection.send({"metrics": metrics})
        finally:
            self._engine.release(model, holder)

    def _status(self, connection: Connection, _header: dict[str, Any], _body: bytearray) -> None:
        models = {name: worker | {"door": self.address} for name, worker in self._engine.status().items()}
        connection.send({"models": models})


def _send_error(connection: Connection, error: LunaError) -> None:
    answer = {"status": error.status, "content_type": JSON, "reason": type(error).__name__, "retry_after": None}
    _send(connection, answer, error.to_json())


def _send(connection: Connection, header: dict[str, Any], body: bytes = b"") -> None:
    """To somebody who may have left."""
    with suppress(OSError):
        connection.send(header, body)
