"""What one process serves on one device: models that relays hold, requests to them, and an account of both."""

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.comfyui.installation import Installation
from engine.faults import Faults
from engine.memory_budget import Budgets
from engine.replacements import is_replaced
from engine.residency import Residency
from engine.role import Item, Reply, Role, Surroundings
from engine.roles import role_class
from engine.scheduler import Call, Scheduler
from engine.settings import settings_of
from engine.telemetry import Telemetry
from engine.transport import Transport, encoded
from luna_protocol.answer import Answer
from luna_protocol.errors import Broken, Internal, Loading, LunaError, NotLoaded, OutOfMemory, Unavailable
from luna_protocol.messages import Readiness, Ready, Worker, parse_request

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Model:
    """A served model: what it is, who holds it, and its role once it is loaded, or why it is not.

    seconds: how long one forward may take before the engine is taken to hang. run: the run folder, once it is known.
    """

    name: str
    worker: Worker
    telemetry: Telemetry
    seconds: float
    role: Role | None = None
    run: Path | None = None
    failure: LunaError | None = None
    holders: list[object] = field(default_factory=list)
    settled: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Safe to share among threads.

    Args:
        key: what the device is called: "cpu", or a GPU's number, which may be one that is not there and stands for the
            CPU then.
        end: ends the process, where its device is lost to it.
    """

    def __init__(self, key: str, end: Callable[[int], Any] = os._exit):
        cuda = key != "cpu" and torch.cuda.is_available()
        self.key = key
        installation = Installation.from_environment()
        # ComfyUI computes on the first GPU that it sees, and is shown no other (see handlers/engine_link.py).
        number = "0" if installation else key
        self.device = torch.device(f"cuda:{number}") if cuda else torch.device("cpu")
        memory = None
        if cuda:
            # Before anything else of CUDA: its context would lie on GPU 0.
            torch.cuda.set_device(self.device)
            memory = torch.cuda.get_device_properties(self.device).total_memory
        self.comfyui = installation.begin(on_cpu=not cuda) if installation else None
        self.residency = Residency(self.device, key, Budgets.from_environment().of(key, memory))
        self._faults = Faults(self.residency, end)
        self.scheduler = Scheduler(self._faults, self._ran)
        self.transport = Transport()
        self._beside = not cuda and torch.get_num_threads() == 1
        self._models: dict[str, Model] = {}
        self._leaving: list[Model] = []
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def hold(
        self,
        name: str,
        settings: Mapping[str, Any],
        holder: object,
        seconds: float,
        failure: str = "",
        begins: Callable[[], None] = lambda: None,
    ) -> Model:
        """The model, loaded by the first that holds it, or with the reason why it is not.

        Args:
            settings: those of its archive, under the key `handler`.
            holder: stands for whoever wants it, until `release`.
            seconds: see `Model`.
            failure: the reason, where it is known that loading it would not do.
            begins: is called when it begins to load, unless somebody else has it loaded.
        """
        with self._lock:
            model = self._models.get(name)
            if first := model is None:
                worker = Worker(
                    pid=os.getpid(),
                    state="loading",
                    device=str(self.device),
                    assigned_gpu=None if self.key == "cpu" else int(self.key),
                    budget_bytes=self.residency.budget,
                    comfyui=self.comfyui,
                )
                model = self._models[name] = Model(name, worker, Telemetry(self.device), seconds)
            model.holders.append(holder)
        if first:
            try:
                with self._loading:
                    begins()
                    model.failure = Broken(failure) if failure else self._load(model, settings)
                if model.failure:
                    self._tidy()
            finally:
                model.worker.state = "failed" if model.failure else "ready"
                model.worker.reason = str(model.failure or "")
                model.worker.last_used = time.time()
                model.settled.set()
        model.settled.wait()
        return model

    def release(self, model: Model, holder: object) -> None:
        """The last to release a model unloads it; who waits for it is told so."""
        with self._lock:
            model.holders.remove(holder)
            if model.holders:
                return
            del self._models[model.name]
            self._leaving.append(model)
        model.settled.wait()
        if role := model.role:
            model.failure = NotLoaded(f"{model.name} was unloaded", "load it again")
            self.scheduler.drop(role, model.failure)
            model.role = None
            role.close()
            self._forget(role)
            del role
            self._tidy()
        self._leaving.remove(model)

    @property
    def is_wanted(self) -> bool:
        """Whether a model is held, or still ends its decode jobs."""
        return bool(self._models or self._leaving)

    def status(self) -> dict[str, dict[str, Any]]:
        """{model: its `Worker`}."""
        with self._lock:
            models = list(self._models.values())
        for model in models:
            model.worker.relays = len(model.holders)
            if model.role:
                model.worker.busy = self.scheduler.is_busy(model.role)
                model.worker.resident = model.role.weights.resident
        return {model.name: model.worker.model_dump() for model in models}

    def overdue(self) -> str | None:
        """The model whose forward has taken longer than it may."""
        since = self.scheduler.since
        if since and since[0]:
            model = self._models.get(since[0].name)
            if model and time.monotonic() - since[1] > model.seconds:
                return model.name
        return None

    def predict(
        self, name: str, body: bytes | bytearray | dict, client: str, is_gone: Callable[[], bool] = lambda: False
    ) -> Answer:
        """The answer to one request; its errors are answers too.

        Args:
            body: a blob, JSON, or what names the client's shared memory.
            client: who pays for the time that it takes.
        """
        return encoded(self._predicted(name, body, client, is_gone), body, self.transport)

    def _predicted(self, name: str, body: Any, client: str, is_gone: Callable[[], bool]) -> Reply | LunaError:
        model = self._models.get(name)
        if model is None:
            return NotLoaded(f"this engine has no model {name!r}", "scripts/models.py lists what is loaded")
        model.worker.last_used = time.time()
        try:
            outcome: Reply | LunaError = self._answered(model, body, client, is_gone)
        except LunaError as error:
            outcome = error
        except CancelledError:
            outcome = Unavailable("the client has left")
        except Exception as error:
            log.exception("a request of %s failed", name)
            outcome = Internal(f"{type(error).__name__}: {error}", "the server's log has the whole story")
        self._account(model, outcome)
        return outcome

    def _answered(self, model: Model, body: Any, client: str, is_gone: Callable[[], bool]) -> Reply:
        model.settled.wait()
        if model.run and is_replaced(model.run, model.name):
            raise Loading(f"{model.name} is being replaced", "try again", retry_after=1)
        role = model.role
        self._check_file(model, role)
        if model.failure:
            raise model.failure.fresh()
        message, tensors = self.transport.receive(body)
        request = parse_request(message, (*role.accepts, Readiness))
        if isinstance(request, Readiness):
            return Reply(Ready(), {})
        item = Item(request, tensors)
        if role.answers_at_once(request):
            return role.run([item])[0]
        call = Call(role, item, client, is_gone)
        self.scheduler.submit(call)
        return call.outcome.result()

    def _check_file(self, model: Model, role: Role | None) -> None:
        """On a CPU weights are mapped, and wrong for good once the file was overwritten."""
        if role is None or self.device.type != "cpu":
            return
        try:
            role.file.check_mapped()
        except Broken as error:
            model.failure = error.fresh()
            model.worker.state, model.worker.reason = "failed", str(error)

    def _account(self, model: Model, outcome: Reply | LunaError) -> None:
        model.worker.requests += 1
        model.worker.last_used = time.time()
        model.telemetry.answered(outcome.code if isinstance(outcome, LunaError) else "ok")
        model.telemetry.memory(model.worker.weights_bytes)
        if isinstance(outcome, Reply):
            for counter, amount in outcome.counters.items():
                model.telemetry.observe(counter, amount, "count", "counter")
            for gauge, size in outcome.sizes.items():
                model.telemetry.observe(gauge, size, "B", "gauge")

    def _ran(self, role: Role, requests: int, seconds: float) -> None:
        if model := self._models.get(role.name):
            model.telemetry.ran(requests, seconds)

    # Whoever calls: weights that come and go cannot be of inference mode's kind.
    @torch.inference_mode(False)
    def _load(self, model: Model, handler: Mapping[str, Any]) -> LunaError | None:
        """Loads it, or says why not, with nothing left behind."""
        role = None
        try:
            settings = settings_of(handler)
            model.run = settings.roots.run
            role = role_class(settings.role, self.comfyui is not None)(model.name, settings, self.device)
            role.around = Surroundings(
                self.scheduler.between_blocks, lambda function: self._compute(role, function), model.telemetry.observe
            )
            needed = role.expected_bytes()
            model.worker.weights_bytes = needed
            self.scheduler.compute(lambda: self.residency.reserve(model.name, needed), "engine")
            role.load()
            model.worker.dtype = str(role.dtype)[6:]
            self.scheduler.compute(lambda: self._start(role), "engine")
            model.worker.weights_bytes = role.weights.nbytes
            role.open()
            model.role = role
            return None
        except Exception as error:
            log.exception("%s was not loaded", model.name)
            failure = _failure(error)
        if role:
            self._forget(role)
        model.worker.weights_bytes = 0
        return failure

    def _compute(self, role: Role, function: Callable[[], Any]) -> Any:
        """What `function` returns, when nobody's request waits for it; at once and beside them on a CPU of which they
        leave cores free."""

        def ready() -> None:
            self._faults.ready(role)

        def on_device() -> Any:
            ready()
            return self._faults.run(role, function)

        client = f"{role.name}, queue"
        if not self._beside:
            return self.scheduler.compute(on_device, client)
        with role.weights.kept, torch.inference_mode():
            self.scheduler.compute(ready, client)
            return self._faults.run(role, function)

    def _start(self, role: Role) -> None:
        role.warm_up()
        self.residency.add(role)

    def _forget(self, role: Role) -> None:
        self.scheduler.compute(lambda: self.residency.remove(role), "engine")
        role.around = Surroundings()

    def _tidy(self) -> None:
        """Gives back what nobody refers to any more, and does not wait for the collector to come by."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _failure(error: Exception) -> LunaError:
    """What a model answers that was not loaded; a new error, as the old one's traceback holds its tensors."""
    if isinstance(error, OutOfMemory | Broken):
        return type(error)(error.message, error.hint)
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory("there is no memory left to load it", "unload others, or take a smaller dtype")
    told = str(error) if isinstance(error, LunaError) else f"{type(error).__name__}: {error}"
    return Broken(f"the model did not load: {told}", "fix the cause, then load the model again")
