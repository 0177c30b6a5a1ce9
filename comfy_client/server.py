"""A LunaServe server as its clients see it: inference and management over REST. Needs nothing of ComfyUI or TorchServe.

    server = Server()
    reply, tensors = server.call("sd15.unet", UNetForward(), {"x": x, "timesteps": t, "context": context})

Every fault is a `LunaError`, whether our own handlers told it or TorchServe did.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import torch

from comfy_client.connections import Connections, NotConnected, Response
from comfy_client.transport import Answer, Body, Transport
from luna_protocol.blob import Blob
from luna_protocol.errors import (
    Full,
    Impossible,
    Internal,
    Loading,
    LunaError,
    Malformed,
    NotFound,
    TooLarge,
    Unavailable,
    from_json,
)
from luna_protocol.messages import Index, Missing, RepositoryIndex, Request, validate

ROOT = Path(__file__).resolve().parent.parent
# The same in all requests of one client, so that a proxy can keep it on the node that has its caches.
SESSION_HEADER = "Luna-Session"
_RENEW_BEFORE = timedelta(seconds=60)
_PIECE = 1 << 20
_POLL_SECONDS = 0.3  # TorchServe runs nvidia-smi for every description


class Unreachable(Unavailable):
    """Nothing answers at the server's address, or it stopped answering halfway."""

    code = "unreachable"


class Unauthorized(LunaError):
    """The server wants a token that we do not have."""

    status, code = 401, "unauthorized"


@dataclass(frozen=True)
class Timeouts:
    """In seconds.

    connect: to be connected, and for each megabyte of a request to be taken. answer: for one reply; a forward on a CPU
    may need many. patience: how long a call is repeated while the server is full or loading, or its worker restarts.
    """

    connect: float = 10
    answer: float = 600
    patience: float = 60


class Server:
    """One server; safe to share among threads.

    Args:
        inference, management: the two addresses.
        key_file: TorchServe's tokens; by default what LUNA_TOKEN_FILE names, else that in serve.py's run folder. Where
            there is no such file, requests carry no token. LUNA_TOKEN, where set, is the one token of a proxy.
        connections: kept alive per address; more threads than that may call at once, at the price of a new connection.

    Raises (all methods):
        Unreachable: nothing answers.
        Unauthorized: the token is wrong and could not be renewed.
        Full, Loading: still so after `timeouts.patience`.
        Broken: the model did not load.
        LunaError: whatever else the server told; luna_protocol/errors.py has the kinds.
    """

    def __init__(
        self,
        inference: str = "http://127.0.0.1:8080",
        management: str = "http://127.0.0.1:8081",
        key_file: Path | None = None,
        timeouts: Timeouts = Timeouts(),
        connections: int = 8,
    ) -> None:
        self.inference, self.management = inference.rstrip("/"), management.rstrip("/")
        self.timeouts = timeouts
        self._session = uuid.uuid4().hex
        self._connections = {
            address: Connections(address, timeouts.connect, timeouts.answer, connections)
            for address in (self.inference, self.management)
        }
        self._transport = Transport(self.inference)
        fixed = os.environ.get("LUNA_TOKEN")
        self._tokens = _FixedToken(fixed) if fixed else _Tokens(key_file or _key_file(), self._renew)

    def call(
        self, model: str, request: Request, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The reply's message and tensors.

        Tensors that `request.references` names, and LoRAs of the client's own, are sent only when the worker says that
        it lacks them. A call is tried again while that may help: forwards are pure, and doing one twice does no harm.
        """
        tensors = tensors or {}
        hashes = {name: _known_as(name, request) for name in tensors}
        sent = {name: tensor for name, tensor in tensors.items() if hashes[name] is None}
        while True:
            message, reply = self._transport.ask(Blob(request, sent), lambda body: self._predict(model, body))
            if message.get("kind") != "missing":
                return message, reply
            missing = validate(Missing, message).hashes
            lacking = {name: tensor for name, tensor in tensors.items() if hashes[name] in missing}
            if not lacking.keys() - sent.keys():
                raise Internal(f"{model} asks for tensors that it was sent, or that this request lacks: {missing}")
            sent |= lacking

    def index(self) -> Index:
        """What the store holds, and what is loaded where."""
        message, _ = self.call("repository", RepositoryIndex())
        return validate(Index, message)

    def ping(self) -> bool:
        """Whether the server answers. It calls itself healthy with failing models too: ask `index` for those."""
        try:
            return self._send("GET", self.inference, "/ping", "inference").status == 200
        except Unavailable:
            return False

    def models(self) -> list[str]:
        """The names of the registered models."""
        found, page = [], "0"
        while page:
            answer = self._manage("GET", f"/models?limit=1000&next_page_token={page}")
            found += [model["modelName"] for model in answer["models"]]
            page = answer.get("nextPageToken")
        return found

    def describe(self, model: str) -> dict[str, Any]:
        """TorchServe's own account of a registered model: settings, queue, and the `status` of each worker."""
        return self._manage("GET", f"/models/{quote(model)}")[0]

    def register(self, archive: str) -> bool:
        """Have an archive of the store (a file name) loaded; `wait_ready` tells when it is. False if it was already."""
        try:
            self._manage("POST", f"/models?{urlencode({'url': archive, 'synchronous': 'false'})}")
        except _AlreadyThere:
            return False
        return True

    def load(self, model: str) -> None:
        """Have a model of the store loaded; one that is registered without a worker that serves starts anew."""
        if not self.register(archive_name(model)):
            workers = next((each.workers for each in self.index().models if each.name == model), [])
            wanted = self.describe(model)["minWorkers"]
            if not wanted or (workers and all(worker.state == "failed" for worker in workers)):
                self.scale(model, 0)
                self.scale(model, max(1, wanted))

    def unload(self, model: str, seconds: float = 60) -> None:
        """Unregister a model once nobody waits for it: TorchServe would never answer those that wait.

        Raises:
            Full: they still waited after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while self._is_used(model):
            if time.monotonic() > deadline:
                raise Full(f"{model} still has requests after {seconds:.0f} s", "stop its clients first")
            time.sleep(_POLL_SECONDS)
        self.unregister(model)

    def unregister(self, model: str) -> None:
        """End a model's workers and forget it, whoever waits for it; its archive stays."""
        self._manage("DELETE", f"/models/{quote(model)}")

    def versions(self, model: str) -> tuple[list[str], str]:
        """The registered versions of a model, and the one that answers to its plain name."""
        every = self._manage("GET", f"/models/{quote(model)}/all")
        return sorted(each["modelVersion"] for each in every), self.describe(model)["modelVersion"]

    def set_default(self, model: str, version: str) -> None:
        """Have this version answer to the model's plain name."""
        self._manage("PUT", f"/models/{quote(model)}/{quote(version)}/set-default")

    def scale(self, model: str, workers: int) -> None:
        """Start or end workers of a model; `wait_ready` tells when they are there."""
        count = {"min_worker": workers, "max_worker": workers, "synchronous": "false"}
        self._manage("PUT", f"/models/{quote(model)}?{urlencode(count)}")

    def wait_ready(
        self,
        models: Iterable[str],
        seconds: float = 600,
        progress: Callable[[str, int, int], None] = lambda model, ready, wanted: None,
    ) -> None:
        """Wait until all workers of the models answer; `progress(model, ready, wanted)` is called at each change.

        Raises:
            Unavailable: not all of them did within `seconds`.
        """
        deadline = time.monotonic() + seconds
        told: dict[str, tuple[int, int]] = {}
        waiting = list(models)
        while waiting:
            for model in list(waiting):
                state = self._ready(model)
                if told.get(model) != state:
                    progress(model, *state)
                    told[model] = state
                if state[0] >= state[1]:
                    waiting.remove(model)
            if waiting and time.monotonic() > deadline:
                late = ", ".join(f"{model} ({told[model][0]} of {told[model][1]})" for model in waiting)
                raise Unavailable(
                    f"workers not ready after {seconds:.0f} s: {late}", "the server's logs/ have the reason"
                )
            if waiting:
                time.sleep(_POLL_SECONDS)

    def _is_used(self, model: str) -> bool:
        workers = next((each.workers for each in self.index().models if each.name == model), [])
        return self.pending(model) > 0 or any(worker.busy for worker in workers)

    def pending(self, model: str) -> int:
        """How many requests wait for a worker of this model."""
        return self.describe(model)["jobQueueStatus"]["pendingRequests"]

    def _ready(self, model: str) -> tuple[int, int]:
        description = self.describe(model)
        ready = sum(worker["status"] == "READY" for worker in description["workers"])
        return ready, description["minWorkers"]

    def _predict(self, model: str, body: Body) -> Answer:
        """One inference, tried again while the server is full, loading or restarting the worker."""
        deadline = time.monotonic() + self.timeouts.patience
        deaths = 0
        while True:
            response = self._send("POST", self.inference, f"/predictions/{quote(model)}", "inference", body)
            if response.status in (200, 202):
                return Answer(response.headers.get("Content-Type", ""), response.data)
            error = _fault(response, model, body.blob_bytes)
            if isinstance(error, _Refused):
                error = self._why_refused(model)
            if isinstance(error, _WorkerDied):
                # Once more, as another request may have killed it. One that sees two workers die is to blame itself.
                deaths += 1
                if deaths > 1:
                    raise error
                self.wait_ready([model], max(0, deadline - time.monotonic()))
            elif isinstance(error, Unavailable) and error.retry_after is not None:
                if time.monotonic() + error.retry_after > deadline:
                    raise error
                time.sleep(error.retry_after)
            else:
                raise error

    def _why_refused(self, model: str) -> Unavailable:
        """TorchServe has one text for a full queue, for workers that start, and for none."""
        try:
            description = self.describe(model)
        except LunaError:  # no way to the management API, as behind a proxy
            return Unavailable(f"{model} is full, loading, or has no worker", "try again", retry_after=0.5)
        if not description["workers"]:
            return Unavailable(f"{model} is registered with no worker", f"scripts/models.py load {model}")
        if not any(worker["status"] == "READY" for worker in description["workers"]):
            return Loading(f"the workers of {model} are starting", "try again", retry_after=0.5)
        waiting = description["jobQueueStatus"]["pendingRequests"]
        return Full(f"{waiting} requests wait for {model} already", "try again, or add workers", retry_after=0.5)

    def _manage(self, method: str, path: str) -> Any:
        response = self._send(method, self.management, path, "management")
        if response.status >= 400:
            raise _fault(response, path.split("?")[0].removeprefix("/models/"), 0)
        return json.loads(response.data)

    def _renew(self, kind: str, api_key: str) -> None:
        self._exchange("GET", self.management, f"/token?type={kind}", api_key, None)

    def _send(self, method: str, address: str, path: str, kind: str, body: Body | None = None) -> Response:
        token = self._tokens.current(kind)
        response = self._exchange(method, address, path, token, body)
        if _token_refused(response):
            renewed = self._tokens.after_refusal(kind, token)
            response = self._exchange(method, address, path, renewed, body)
            if _token_refused(response):
                raise Unauthorized(
                    f"{address} refuses the {kind} token of {self._tokens.file}",
                    "LUNA_TOKEN_FILE names the key_file.json in the run folder of the server that runs now",
                )
        return response

    def _exchange(self, method: str, address: str, path: str, token: str | None, body: Body | None) -> Response:
        headers = {SESSION_HEADER: self._session} | ({"Content-Type": body.content_type} if body else {})
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        attempts = 1 if method == "DELETE" else 3
        for attempt in range(1, attempts + 1):
            try:
                sent = body.fresh() if body else b""
                headers["Content-Length"] = str(len(sent))
                return self._connections[address].exchange(method, path, headers, _pieces(sent))
            except TimeoutError as error:
                raise Unavailable(
                    f"{address} did not answer within {self.timeouts.answer:.0f} s", "Timeouts.answer sets the limit"
                ) from error
            except NotConnected as error:
                raise Unreachable(
                    f"no server at {address}: {error}", "start it with scripts/serve.py, or correct the address"
                ) from error
            except (OSError, HTTPException) as error:  # a kept-alive connection that the server had closed
                if attempt == attempts:
                    raise Unreachable(f"{address} breaks off its answers: {error}", "is it restarting?") from error
        raise AssertionError("unreachable")


class _FixedToken:
    """What a proxy asks for; TorchServe's own tokens are then the proxy's business."""

    file = "LUNA_TOKEN"

    def __init__(self, token: str) -> None:
        self._token = token

    def current(self, _kind: str) -> str:
        return self._token

    def after_refusal(self, _kind: str, _refused: str | None) -> str:
        return self._token


class _Tokens:
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


class _WorkerDied(Internal):
    """The worker ended while it had the request."""


class _Refused(Unavailable):
    """TorchServe itself did not take the request."""


class _AlreadyThere(LunaError):
    """A model of that name is registered."""


def _key_file() -> Path:
    """Where serve.py, under the same environment, has its tokens, unless LUNA_TOKEN_FILE says so."""
    home = os.environ.get("LUNA_HOME") or ROOT
    run = os.environ.get("LUNA_RUN") or Path(home) / "run"
    return Path(os.environ.get("LUNA_TOKEN_FILE") or Path(run) / "key_file.json")


def _pieces(body: bytes | bytearray) -> Iterator[memoryview]:
    """One after the other, because a connection's time-out is for one piece, however large."""
    return (memoryview(body)[start : start + _PIECE] for start in range(0, len(body), _PIECE))


def archive_name(model: str) -> str:
    """The file of the store for a model: X.unet.mar for "X.unet" and its first version "X.unet/1.0", X.unet@2.0.mar for
    "X.unet/2.0"."""
    return f"{model.removesuffix('/1.0').replace('/', '@')}.mar"


def _known_as(tensor: str, request: Request) -> str | None:
    """The hash that stands for a tensor, or None where it always travels."""
    if tensor.startswith("lora."):
        return tensor.split(".", 2)[1]
    return request.references.get(tensor)


def _token_refused(response: Response) -> bool:
    return response.status == 400 and b"InvalidKeyException" in response.data


def _fault(response: Response, model: str, sent: int) -> LunaError:
    """What the server told, ours or TorchServe's."""
    status, retry_after = response.status, response.headers.get("Retry-After", "")
    own = from_json(response.data, float(retry_after) if retry_after.isdecimal() else None)
    if own is not None:
        return own
    try:
        told = str(json.loads(response.data)["message"])
    except (ValueError, KeyError, TypeError):
        told = response.data[:200].decode(errors="replace") or "nothing more"
    if "Worker died" in told:
        return _WorkerDied(f"the worker of {model} died on this request", "the server's logs/ have the reason")
    match status:
        case 400:
            return Malformed(f"TorchServe refuses the request for {model}: {told}")
        case 401 | 403:
            return Unauthorized(f"the proxy refuses the token: {told}", "LUNA_TOKEN holds what it asks for")
        case 404:
            return NotFound(told, "scripts/add_checkpoint.py packs and registers a checkpoint")
        case 405:
            return Impossible(f"the server does not allow this: {told}", "config.properties: enable_model_api=true")
        case 409:
            return _AlreadyThere(told)
        case 413:
            return TooLarge(f"{sent} bytes are more than the server takes", "config.properties: max_request_size")
        case 503:
            return _Refused(told, retry_after=0.5)
        case 502 | 504:
            return Unreachable(f"a proxy lost the server of {model}: {told}", "is it restarting?", retry_after=0.5)
        case _:
            return Internal(f"TorchServe answers {status} for {model}: {told}", "the server's logs/ have the reason")
