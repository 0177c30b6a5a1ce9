"""Where the server is and which tokens open it: environment first, then ComfyUI's settings dialog, then defaults."""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import folder_paths

from luna_client.addresses import is_loopback, normal
from luna_client.manager import Timeouts
from luna_client.server import Server

# ComfyUI is not to hang on a server that does.
_TIMEOUTS = Timeouts(connect=2, question=10)
# {field: (environment variable, id in ComfyUI's settings dialog)}; web/luna.js declares the same ids.
_SOURCES = {
    "inference": ("LUNA_INFERENCE", "Luna.Server.Inference"),
    "management": ("LUNA_MANAGEMENT", "Luna.Server.Management"),
    "metrics": ("LUNA_METRICS", "Luna.Server.Metrics"),
    "token_file": ("LUNA_TOKEN_FILE", "Luna.Server.TokenFile"),
}


@dataclass(frozen=True)
class Settings:
    """tokens_for: the addresses that may see a token. Whoever may write ComfyUI's settings can name any address there,
    but only this machine's own and those of the environment are the operator's word."""

    inference: str = "http://127.0.0.1:8080"
    management: str = "http://127.0.0.1:8081"
    metrics: str = "http://127.0.0.1:8082"
    token_file: str = ""
    tokens_for: frozenset[str] = frozenset()


def current() -> Settings:
    """The settings as they are now: a change in the dialog counts at once."""
    dialog = _dialog()
    found: dict[str, str] = {}
    tokens_for = set()
    for name, (variable, key) in _SOURCES.items():
        given = os.environ.get(variable, "").strip()
        value = given or str(dialog.get(key) or "").strip() or getattr(Settings, name)
        found[name] = value if name == "token_file" else normal(value)
        if name in ("inference", "management") and (given or is_loopback(found[name])):
            tokens_for.add(found[name])
    return Settings(**found, tokens_for=frozenset(tokens_for))


def server() -> Server:
    """The server that the current settings name; the same object as long as they do."""
    return _server(current())


@lru_cache(maxsize=1)
def _server(settings: Settings) -> Server:
    key_file = Path(settings.token_file).expanduser() if settings.token_file else None
    return Server(settings.inference, settings.management, key_file, _TIMEOUTS, tokens_for=settings.tokens_for)


def _dialog() -> dict:
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        dialog = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dialog if isinstance(dialog, dict) else {}
