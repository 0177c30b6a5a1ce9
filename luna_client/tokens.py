"""The tokens that TorchServe, or a proxy before it, wants to see."""

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from luna_client.faults import Unauthorized

ROOT = Path(__file__).resolve().parent.parent
_RENEW_BEFORE = timedelta(seconds=60)


class FixedToken:
    """What a proxy asks for; TorchServe's own tokens are then the proxy's business."""

    file = "LUNA_TOKEN"

    def __init__(self, token: str) -> None:
        self._token = token

    def current(self, _kind: str) -> str:
        return self._token

    def after_refusal(self, _kind: str, _refused: str | None) -> str:
        return self._token


class Tokens:
    """The tokens of a key file, which TorchServe rewrites whenever anyone renews one."""

    def __init__(self, file: Path, renew: Callable[[str, str], None]) -> None:
        self.file = file
        self._renew = renew
        self._keys: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def current(self, kind: str) -> str | None:
        """A token that is good for a while, or None without a key file."""
        with self._lock:
            if not self._lasting(kind):
                self._read()
            if self._keys and not self._lasting(kind):
                self._renew(kind, self._keys["API"]["key"])
                self._read()
            return self._key(kind)

    def after_refusal(self, kind: str, refused: str | None) -> str | None:
        """Another token than the refused one: someone else may have renewed it, or the server was restarted."""
        with self._lock:
            self._read()
            if self._keys and self._key(kind) == refused:
                self._renew(kind, self._keys["API"]["key"])
                self._read()
            return self._key(kind)

    def _key(self, kind: str) -> str | None:
        return self._keys[kind]["key"] if self._keys else None

    def _lasting(self, kind: str) -> bool:
        if not self._keys:
            return False
        # Nanoseconds, which fromisoformat does not read on every Python.
        expires = datetime.fromisoformat(self._keys[kind]["expiration time"].split(".")[0].rstrip("Z")).replace(
            tzinfo=UTC
        )
        return expires - datetime.now(UTC) > _RENEW_BEFORE

    def _read(self) -> None:
        for _ in range(5):
            try:
                self._keys = json.loads(self.file.read_text(encoding="utf-8"))
                return
            except FileNotFoundError:
                self._keys = {}
                return
            except json.JSONDecodeError:  # TorchServe is writing it
                time.sleep(0.05)
            except OSError as error:
                raise Unauthorized(f"cannot read {self.file}: {error}", "its owner started the server") from error
        raise Unauthorized(f"{self.file} is not TorchServe's key file", "LUNA_TOKEN_FILE names it")


def default_key_file() -> Path:
    """Where serve.py, under the same environment, has its tokens, unless LUNA_TOKEN_FILE says so."""
    home = os.environ.get("LUNA_HOME") or ROOT
    run = os.environ.get("LUNA_RUN") or Path(home) / "run"
    return Path(os.environ.get("LUNA_TOKEN_FILE") or Path(run) / "key_file.json").expanduser()
