import io

import pytest
from rich.console import Console

from luna_client.server import Server
from luna_protocol.messages import Worker
from serving import loading


class Loaded:
    """A server whose models are ready as TorchServe sees it; workers of b.unet tell everybody that theirs failed."""

    def load(self, _model: str) -> None: ...

    def wait_ready(self, models, progress) -> None:
        progress(models[0], 1, 1)

    def workers(self, model: str) -> list[Worker]:
        return [Worker(pid=1, state="failed" if model == "b.unet" else "ready", device="cpu")]


def test_a_model_that_failed_is_not_called_ready() -> None:
    told = io.StringIO()
    loading.load(Loaded(), ["a.unet", "b.unet"], Console(file=told, width=200))
    states = {line.split()[0]: line for line in told.getvalue().splitlines() if ".unet" in line}
    assert "1 of 1 workers ready" in states["a.unet"] and "failed" in states["b.unet"]


@pytest.mark.slow
def test_models_start_no_more_at_a_time_than_there_are_cores(server: Server, served_tiny: str, monkeypatch) -> None:
    models = [f"{served_tiny}.{role}" for role in ("clip", "vae")]
    for model in models:
        server.unregister(model)
    begin, unready = server.load, []

    def load(model: str) -> None:
        registered = set(models) & set(server.models())
        unready.append([other for other in registered if server.describe(other)["workers"][0]["status"] != "READY"])
        begin(model)

    monkeypatch.setattr(server, "load", load)
    monkeypatch.setattr(loading, "AT_ONCE", 1)
    told = io.StringIO()
    loading.load(server, [models[0], "absent.unet", models[1]], Console(file=told, width=200))
    assert unready == [[], [], []]
    assert "absent.unet" in told.getvalue()
    assert [server.describe(model)["workers"][0]["status"] for model in models] == ["READY", "READY"]
