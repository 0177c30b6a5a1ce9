"""Where the server is and which tokens open it: environment first, then ComfyUI's settings dialog, then defaults."""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import folder_paths

from comfy_client.manager import Timeouts
from comfy_client.server import Server

# {field: (environment variable, id in ComfyUI's settings dialog)}; web/luna.js declares the same ids.
_SOURCES = {
    "inference": ("LUNA_INFERENCE", "Luna.Server.Inference"),
    "management": ("LUNA_MANAGEMENT", "Luna.Server.Management"),
    "metrics": ("LUNA_METRICS", "Luna.Server.Metrics"),
    "token_file": ("LUNA_TOKEN_FILE", "Luna.Server.TokenFile"),
}


@dataclass(frozen=True)
class Settings:
    inference: str = "http://127.0.0.1:8080"
    management: str = "http://127.0.0.1:8081"
    metrics: str = "http://127.0.0.1:8082"
    token_file: str = ""


def current() -> Settings:
    """The settings as they are now: a change in the dialog counts at once."""
    dialog = _dialog()
    found = {name: os.environ.get(variable) or str(dialog.get(key) or "") for name, (variable, key) in _SOURCES.items()}
    return Settings(**{name: value for name, value in found.items() if value})


def server() -> Server:
    """The server that the current settings name; the same object as long as they do."""
    return _server(current())


@lru_cache(maxsize=1)
def _server(settings: Settings) -> Server:
    key_file = Path(settings.token_file) if settings.token_file else None
    return Server(settings.inference, settings.management, key_file, Timeouts(connect=2))


def _dialog() -> dict:
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
