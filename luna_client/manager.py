"""A LunaServe server as those see it who operate it: what it holds, what is loaded, and its decode queue.

Nothing here handles tensors, so nothing imports torch, which alone takes two seconds and 200 MB.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from luna_client.addresses import is_loopback, normal
from luna_client.connections import Answer, Body, Connections, NotConnected, Response
from luna_client.doors import Doors
from luna_client.faults import (
    AlreadyThere,
    NotServed,
    Refused,
    TokenKeptBack,
    Unauthorized,
    Unreachable,
    WorkerDied,
    fault,
    token_refused,
)
from luna_client.tokens import FixedToken, Tokens, default_key_file
from luna_protocol import JSON
from luna_protocol.errors import EngineEnded, Full, Loading, LunaError, Unavailable
from luna_protocol.messages import Index, RepositoryIndex, Request, Worker, validate
from luna_protocol.model_names import archive_name, with_version

# The same in all requests of one client, so that a proxy can keep it on the node that has its caches.
SESSION_HEADER = "Luna-Session"
_POLL_SECONDS = 0.3  # TorchServe runs nvidia-smi for every description


@dataclass(frozen=True)
class Timeouts:
    """In seconds.

    connect: to be connected, and for each megabyte of a request to be taken. answer: for one reply; a forward on a CPU
    may need many. question: for a reply that nothing is computed for, such as the index. patience: how long a call is
    repeated while the server is full or loading, or its worker restarts.
    """

    connect: float = 10
    answer: float = 600
    question: float = 60
    patience: float = 60


class Manager:
    """One server, without what needs torch; safe to share among threads.

    Args:
        inference, management: the two addresses.
        key_file: TorchServe's tokens; by default what LUNA_TOKEN_FILE names, else that in serve.py's run folder. Where
            there is no such file, requests carry no token. LUNA_TOKEN, where set, is the one token of a proxy.
        doors: whether to take the short way past HTTP where the server is on this machine.
        connections: kept alive per address; more threads than that may call at once, at the price of a new connection.
        tokens_for: the addresses that may see a token; None: both.

    Raises (all methods):
        Malformed: an address is none.
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
        doors: bool = True,
        tokens_for: frozenset[str] | None = None,
    ) -> None:
        self.inference, self.management = normal(inference), normal(management)
        self._tokens_for = {self.inference, self.management} if tokens_for is None else tokens_for
        self.timeouts = timeouts
        self._session = uuid.uuid4().hex
        self._registering = threading.Lock()
        self._connections = {
            address: Connections(address, timeouts.connect, connections)
            for address in (self.inference, self.management)
        }
        self._doors = None
        if doors and is_loopback(self.inference):
            self._doors = Doors(self._session, timeouts.answer)
        fixed = os.environ.get("LUNA_TOKEN")
        self._tokens = FixedToken(fixed) if fixed else Tokens(key_file or default_key_file(), self._renew)

    def ask(self, request: Request) -> dict[str, Any]:
        """What the repository model replies."""
        body = request.model_dump_json().encode()
        return json.loads(self._predict("repository", Body(JSON, len(body), lambda: body)).body)

    def index(self) -> Index:
        """What the store holds, and what is loaded where."""
        return validate(Index, self.ask(RepositoryIndex()))

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

    def describe_versions(self, model: str) -> list[dict[str, Any]]:
        """As `describe`, of each registered version."""
        return self._manage("GET", f"/models/{quote(model)}/all")

    def register(self, archive: str) -> bool:
        """Have an archive of the store (a file name) loaded; `wait_ready` tells when it is. False if it was already."""
        # Of two versions of a model that come at the same moment, TorchServe accepts both and forgets one.
        with self._registering:
            try:
                self._manage("POST", f"/models?{urlencode({'url': archive, 'synchronous': 'false'})}")
            except AlreadyThere:
                return False
            return True

    def load(self, model: str) -> None:
        """Have a model of the store loaded; one that is registered without a worker that serves starts anew."""
        if not self.register(archive_name(model)):
            workers = self.workers(model)
            wanted = self.describe(with_version(model))["minWorkers"]
            if not wanted or (workers and all(worker.state == "failed" for worker in workers)):
                self.scale(model, 0)
                self.scale(model, max(1, wanted))

    def unload(self, model: str, seconds: float = 60) -> None:
        """Unregister a model of the store once nobody waits for it: TorchServe would never answer those that wait.

        The default of several versions of the store stays registered, without workers, so that its plain name does not
        come to mean another one, now or when they are loaded again.

        Raises:
            Full: they still waited after `seconds`.
        """
        self.wait_unused(model, seconds)
        name, _, version = with_version(model).partition("/")
        several = sum(each.name.partition("/")[0] == name for each in self.index().models) > 1
        if several and self.describe(name)["modelVersion"] == version:
            self.scale(model, 0)
        else:
            self.unregister(model)

    def unregister(self, model: str) -> None:
        """End the workers of a model of the store and forget it, whoever waits for it; its archive stays.

        Raises:
            DefaultVersion: it is the default of several versions.
        """
        self._manage("DELETE", f"/models/{quote(with_version(model))}")

    def versions(self, model: str) -> tuple[list[str], str]:
        """The registered versions of a model, and the one that answers to its plain name."""
        every = self.describe_versions(model)
        return sorted(each["modelVersion"] for each in every), self.describe(model)["modelVersion"]

    def set_default(self, model: str, version: str) -> None:
        """Have this version answer to the model's plain name."""
        self._manage("PUT", f"/models/{quote(model)}/{quote(version)}/set-default")

    def scale(self, model: str, workers: int) -> None:
        """Start or end workers of a model of the store; `wait_ready` tells when they are there."""
        count = {"min_worker": workers, "max_worker": workers, "synchronous": "false"}
        self._manage("PUT", f"/models/{quote(with_version(model))}?{urlencode(count)}")

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

    def wait_unused(self, model: str, seconds: float) -> None:
        """
        Raises:
            Full: requests still waited for the model, or ran, after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while self._is_used(model):
            if time.monotonic() > deadline:
                raise Full(f"{model} still has requests after {seconds:.0f} s", "stop its clients first")
            time.sleep(_POLL_SECONDS)

    def _is_used(self, model: str) -> bool:
        return self.pending(model) > 0 or any(worker.busy for worker in self.workers(model))

    def workers(self, model: str) -> list[Worker]:
        """The live workers of a model of the store."""
        named = with_version(model)
        return next((each.workers for each in self.index().models if with_version(each.name) == named), [])

    def pending(self, model: str) -> int:
        """How many requests wait for a worker of this model of the store."""
        return self.describe(with_version(model))["jobQueueStatus"]["pendingRequests"]

    def _ready(self, model: str) -> tuple[int, int]:
        description = self.describe(model)
        ready = sum(worker["status"] == "READY" for worker in description["workers"])
        return ready, description["minWorkers"]

    def _predict(self, model: str, body: Body) -> Answer:
        """One inference, tried again while the server is full, loading or restarting the worker."""
        deadline = time.monotonic() + self.timeouts.patience
        deaths = 0
        while True:
            try:
                response = self._posted(model, body)
            except EngineEnded as ended:
                error: LunaError = ended
            else:
                if response.status in (200, 202):
                    return Answer(response.headers.get("Content-Type", ""), response.data)
                error = fault(response, model, body.blob_bytes)
            if isinstance(error, Refused | NotServed):
                error = self._why_refused(model, error)
            if isinstance(error, WorkerDied | EngineEnded):
                # Once more, as another request may have killed it. One that sees two of them die is to blame itself.
                deaths += 1
                if deaths > 1:
                    raise error
                # What keeps it from being ready, the next try tells, also without a way to the management API.
                with suppress(LunaError):
                    self.wait_ready([model], max(0, deadline - time.monotonic()))
            elif isinstance(error, Unavailable) and error.retry_after is not None:
                if time.monotonic() + error.retry_after > deadline:
                    raise error
                time.sleep(error.retry_after)
            else:
                raise error

    def abort(self, thread: int) -> None:
        """Ends the call of another thread, by its id, and what the server does for it."""
        if self._doors:
            self._doors.abort(thread)

    def _posted(self, model: str, body: Body) -> Response:
        if self._doors and model != "repository":
            try:
                if response := self._doors.exchange(model, body, self.index):
                    return response
            except TimeoutError as error:
                raise Unavailable(
                    f"{model} did not answer within {self.timeouts.answer:.0f} s", "Timeouts.answer sets the limit"
                ) from error
        return self._send("POST", self.inference, f"/predictions/{quote(model)}", "inference", body)

    def _why_refused(self, model: str, refusal: LunaError) -> LunaError:
        """TorchServe has one text for a full queue, for workers that start, and for none; and none for replacements."""
        if isinstance(refusal, NotServed):
            return self._being_replaced(model) or refusal
        try:
            description = self.describe(model)
        except LunaError:  # no way to the management API, as behind a proxy
            return Unavailable(f"{model} is full, loading, or has no worker", "try again", retry_after=0.5)
        if not description["workers"]:
            none = Unavailable(f"{model} is registered with no worker", f"scripts/models.py load {model}")
            return self._being_replaced(model) or none
        if not any(worker["status"] == "READY" for worker in description["workers"]):
            return Loading(f"the workers of {model} are starting", "try again", retry_after=0.5)
        waiting = description["jobQueueStatus"]["pendingRequests"]
        return Full(f"{waiting} requests wait for {model} already", "try again, or add workers", retry_after=0.5)

    def _being_replaced(self, model: str) -> Loading | None:
        if model == "repository":
            return None
        with suppress(LunaError):
            for each in self.index().models:
                if each.replacing and with_version(each.name) == with_version(model):
                    return Loading(f"{model} is being replaced", "try again", retry_after=0.5)
        return None

    def _manage(self, method: str, path: str) -> Any:
        response = self._send(method, self.management, path, "management")
        if response.status >= 400:
            raise fault(response, path.split("?")[0].removeprefix("/models/"), 0)
        return json.loads(response.data)

    def _renew(self, kind: str, api_key: str) -> None:
        if self.management not in self._tokens_for:
            raise TokenKeptBack(self.management)
        self._exchange("GET", self.management, f"/token?type={kind}", api_key, None)

    def _send(self, method: str, address: str, path: str, kind: str, body: Body | None = None) -> Response:
        trusted = address in self._tokens_for
        token = self._tokens.current(kind) if trusted else None
        response = self._exchange(method, address, path, token, body)
        if not trusted and (token_refused(response) or response.status in (401, 403)):
            raise TokenKeptBack(address)
        if token_refused(response):
            renewed = self._tokens.after_refusal(kind, token)
            response = self._exchange(method, address, path, renewed, body)
            if token_refused(response):
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
        is_question = method == "GET" or path == "/predictions/repository"
        seconds = self.timeouts.question if is_question else self.timeouts.answer
        for attempt in range(1, attempts + 1):
            try:
                sent = body.fresh() if body else b""
                headers["Content-Length"] = str(len(sent))
                return self._connections[address].exchange(method, path, headers, sent, seconds)
            except TimeoutError as error:
                raise Unavailable(
                    f"{address} did not answer within {seconds:.0f} s", "is it overloaded? See the server's logs/"
                ) from error
            except NotConnected as error:
                raise Unreachable(
                    f"no server at {address}: {error}", "start it with scripts/serve.py, or correct the address"
                ) from error
            except (OSError, HTTPException) as error:  # a kept-alive connection that the server had closed
                if attempt == attempts:
                    raise Unreachable(f"{address} breaks off its answers: {error}", "is it restarting?") from error
        raise AssertionError("unreachable")
