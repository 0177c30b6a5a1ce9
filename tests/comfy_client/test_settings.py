"""Which addresses ComfyUI uses, and which of them may see a token: whoever opens ComfyUI may write its dialog."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """The module, beside a ComfyUI whose user folder is tmp_path."""
    for name in ("LUNA_INFERENCE", "LUNA_MANAGEMENT", "LUNA_METRICS", "LUNA_TOKEN_FILE", "LUNA_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(get_user_directory=lambda: str(tmp_path)))
    monkeypatch.delitem(sys.modules, "comfy_client.settings", raising=False)
    yield importlib.import_module("comfy_client.settings")
    sys.modules.pop("comfy_client.settings")


def dialog(tmp_path, text: str | dict) -> None:
    (tmp_path / "default").mkdir(exist_ok=True)
    (tmp_path / "default" / "comfy.settings.json").write_text(text if isinstance(text, str) else json.dumps(text))


def test_defaults_are_this_machine_s_and_may_have_the_token(settings) -> None:
    now = settings.current()
    assert now.tokens_for == {now.inference, now.management} == {"http://127.0.0.1:8080", "http://127.0.0.1:8081"}


def test_an_address_of_the_dialog_elsewhere_gets_no_token(settings, tmp_path, monkeypatch) -> None:
    dialog(tmp_path, {"Luna.Server.Management": "http://evil.example:8081"})
    now = settings.current()
    assert now.management == "http://evil.example:8081" and now.tokens_for == {now.inference}
    # The environment is the operator's word, and wins.
    monkeypatch.setenv("LUNA_MANAGEMENT", "gpu.example:8081/")
    now = settings.current()
    assert now.management == "http://gpu.example:8081" and now.management in now.tokens_for
    dialog(tmp_path, {"Luna.Server.Inference": "https://evil.example"})
    assert settings.current().tokens_for == {"http://gpu.example:8081"}


def test_the_environment_wins_and_spaces_are_nothing(settings, tmp_path, monkeypatch) -> None:
    dialog(
        tmp_path, {"Luna.Server.Inference": "127.0.0.1:1", "Luna.Server.Metrics": "  ", "Luna.Server.TokenFile": "~/k"}
    )
    monkeypatch.setenv("LUNA_INFERENCE", " ")
    assert settings.current().inference == "http://127.0.0.1:1"
    assert settings.current().metrics == "http://127.0.0.1:8082"
    monkeypatch.setenv("LUNA_INFERENCE", "127.0.0.1:2")
    assert settings.server().inference == "http://127.0.0.1:2"
    assert settings.server() is settings.server()


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"Luna.Server.Inference": null}', "\x00"])
def test_a_dialog_that_cannot_be_read_is_none(settings, tmp_path, text) -> None:
    dialog(tmp_path, text)
    assert settings.current().inference == "http://127.0.0.1:8080"
