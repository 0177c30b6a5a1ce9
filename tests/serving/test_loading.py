import io

import pytest
from rich.console import Console

from comfy_client.server import Server
from serving import loading


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
