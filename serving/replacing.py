"""Puts a new archive in the place of a registered one that clients use, without losing a request."""

import time

from luna_client.faults import DefaultVersion
from luna_client.manager import Manager
from luna_protocol.messages import ReplaceModel
from luna_protocol.model_names import archive_name, with_version

_RECORD_SECONDS = 1.1  # workers write what they do at most once a second


def replace(server: Manager, model: str, seconds: float = 120) -> None:
    """Register a model of the store, whose archive is a new one, in place of the one that is registered.

    Requests that run get their answers; those that wait or come meanwhile are answered `Loading`, and so come again.

    Raises:
        NotFound: it is not registered.
        Full: requests still ran after `seconds`; the registered one stays.
        DefaultVersion: it is the default of several versions; it stays.
    """
    workers = server.describe(with_version(model))["minWorkers"]
    server.ask(ReplaceModel(model=model))
    try:
        time.sleep(_RECORD_SECONDS)
        server.wait_unused(model, seconds)
        # Without workers, TorchServe takes no request; one that had come a moment before would be lost.
        server.scale(model, 0)
        while server.pending(model):
            server.scale(model, workers)
            server.wait_unused(model, seconds)
            server.scale(model, 0)
        try:
            server.unregister(model)
        except DefaultVersion:
            server.scale(model, workers)
            raise
        server.register(archive_name(model))
    finally:
        server.ask(ReplaceModel(model=model, done=True))
