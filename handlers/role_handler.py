"""What the four roles share: TorchServe's entry points, decoding, batching and errors.

TorchServe hands over requests of several clients in one call. Each is decoded and checked alone, those that fit
together run as one, and each gets its own reply or its own error: what one client sends never fails another's request.
"""

import logging
import os
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from handlers.engine.checkpoints import detect, read_header, weights_size
from handlers.engine.host_memory import keep_freed_memory
from handlers.engine.lora.overlays import Stack
from handlers.engine.memory_budget import Budgets, device_key
from handlers.engine.tensor_cache import TensorCache
from handlers.engine.weights import compute_dtype
from handlers.metrics import HandlerMetrics
from handlers.settings import settings_of
from handlers.transport import Transport, is_plain_json
from handlers.worker_state import WorkerState
from luna_protocol import JSON
from luna_protocol.blob import Blob
from luna_protocol.errors import Broken, Impossible, Internal, LunaError, Malformed, OutOfMemory
from luna_protocol.messages import Message, Missing, Readiness, Ready, Request, Worker, parse_request
from luna_protocol.model_names import without_first

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Request)


@dataclass
class Item(Generic[R]):
    """One client's request with its tensors, as they came: on the CPU, in memory that is the client's again once it has
    its reply; what is kept for longer has to be cloned. `stack` is its LoRAs, for roles that take some."""

    request: R
    tensors: dict[str, Tensor]
    stack: Stack = field(default_factory=Stack)

    def take(self, name: str, ndim: int, floating: bool = True) -> Tensor:
        """The tensor `name`, which must have `ndim` dimensions, of a floating dtype or of an integer one.

        Raises:
            Malformed: it was not sent.
            Impossible: it has other dimensions, or the other kind of dtype.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            sent = ", ".join(sorted(self.tensors)) or "none"
            raise Malformed(f"the tensor {name!r} is missing", f"sent were: {sent}")
        if tensor.ndim != ndim:
            raise Impossible(f"{name} has shape {list(tensor.shape)}", f"it needs {ndim} dimensions")
        if tensor.is_floating_point() != floating or tensor.dtype == torch.bool:
            raise Impossible(f"{name} is {str(tensor.dtype)[6:]}", f"send {'float32' if floating else 'int64'}")
        return tensor


@dataclass
class Reply:
    """A message, its tensors, by how much this request raises counters that metrics.yaml declares, bytes that gauges of
    it show from now on, and its status."""

    message: Message
    tensors: dict[str, Tensor]
    counters: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    status: int = 200


class RoleHandler:
    """A TorchServe handler for one role; subclasses say what they accept, load and run."""

    accepts: tuple[type[Request], ...] = ()
    file: tuple[Path, tuple[int, int, int]] | None = None  # the checkpoint, and its state when it was loaded

    # What a role defines

    def load(self) -> None:
        """Loads what the role serves; `self.settings`, `self.device` and `self.dtype` are set."""
        raise NotImplementedError

    def weights_bytes(self) -> int:
        """Bytes of weights this worker holds."""
        return 0

    def missing(self, item: Item) -> list[str]:
        """Content hashes, beside those of `references`, that the client has to send first."""
        return []

    def warm_up(self) -> None:
        """Runs once what requests will run, in small: kernels, libraries' caches and mapped weights are then in
        place."""

    def check(self, item: Item) -> None:
        """Raises what is wrong with this request before it may join others."""

    def group_key(self, item: Item) -> Hashable:
        """Requests with equal keys run together; by default each alone."""
        return id(item)

    def batch_size(self, item: Item) -> int:
        """What this request adds to a group, of which at most `settings.batch_positions` run together."""
        return 0

    def run(self, items: list[Item]) -> list[Reply]:
        """Replies to requests of one group, in their order."""
        raise NotImplementedError

    # TorchServe's entry points

    def initialize(self, context) -> None:
        """Loads the model. Never raises, because TorchServe would keep restarting the worker and tell no client why:
        the reason is kept, and every request is answered with it."""
        self.failure: Exception | None = None
        self.state: WorkerState | None = None
        # TorchServe's worker tells the root logger of every request, and each line goes through the JVM. Metrics go the
        # same way, by loggers of their own.
        logging.getLogger().setLevel(logging.WARNING)
        for name in ("ts", "handlers"):
            logging.getLogger(name).setLevel(logging.INFO)
        keep_freed_memory()
        try:
            self._set_up(context)
            self.state.check_deaths()
            if self.settings.checkpoint is not None:
                path = self.settings.checkpoint_path()
                self._check_family(path)
                self.file = path, _state_of(path)
                needed = weights_size(path, self.settings.role, self.dtype.itemsize)
                self.state.claim(needed, self._budget())
            self.load()
            with torch.inference_mode():
                self.warm_up()
            self.state.loaded(self.weights_bytes())
        except Exception as error:
            log.exception("%s did not start", context.model_name)
            self.failure = error
            if self.state:
                self.state.update(now=True, state="failed", weights_bytes=0, reason=str(error))

    def handle(self, data: list[dict[str, Any]], context) -> list[bytes]:
        """One reply per row of `data`."""
        if self.state:
            self.state.update(busy=True, last_used=time.time())
        outcomes: list[Reply | LunaError | None] = [None] * len(data)
        items: dict[int, Item] = {}
        with torch.inference_mode():
            for index, row in enumerate(data):
                outcomes[index] = self._guarded(lambda row=row, index=index: self._admit(row, index, items))
            for indices in self._groups(items):
                self._run_group(indices, items, outcomes)
        if self.state:
            for outcome in outcomes:
                self.telemetry.answered(outcome.code if isinstance(outcome, LunaError) else "ok")
            self.telemetry.memory(self.state.record.worker.weights_bytes)
            requests = self.state.record.worker.requests + len(data)
            self.state.update(requests=requests, busy=False, last_used=time.time())
        return [
            self._encode(outcome, row, context, i) for i, (outcome, row) in enumerate(zip(outcomes, data, strict=True))
        ]

    # Their steps

    def _set_up(self, context) -> None:
        gpu = context.system_properties.get("gpu_id")
        assigned = None if gpu is None else int(gpu)
        # A server can be told of GPUs that are not there, to try out an assignment: it then runs on the CPU.
        cuda = assigned is not None and torch.cuda.is_available()
        self.device = torch.device(f"cuda:{assigned}") if cuda else torch.device("cpu")
        self.settings = settings_of(context.model_yaml_config["handler"])
        self.dtype = compute_dtype(self.settings.role, self.settings.dtype, self.device)
        self.transport = Transport()
        self.model_name, self.metrics = context.model_name, context.metrics
        self.tensors = TensorCache(self.settings.tensor_cache_mb << 20)
        worker = Worker(
            pid=os.getpid(), state="loading", device=str(self.device), assigned_gpu=assigned, dtype=str(self.dtype)[6:]
        )
        version = context.manifest["model"]["modelVersion"]
        model = without_first(f"{context.model_name}/{version}")
        self.state = WorkerState(self.settings.roots.run, model, worker)
        self.telemetry = HandlerMetrics(context.metrics, context.model_name, self.device)

    def _budget(self) -> int | None:
        cuda = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(self.device).total_memory if cuda else None
        return Budgets.from_environment().of(device_key(self.state.record.worker), memory)

    def _check_family(self, path: Path) -> None:
        family = detect(read_header(path)).family
        if family != self.settings.family:
            raise Broken(
                f"{path.name} was packed as {self.settings.family}, and is {family} now",
                "pack it again with scripts/add_checkpoint.py",
            )

    def _check_file(self) -> None:
        """Mapped weights are what the file holds now: fails for good once it was overwritten in place. A file that took
        its place is another one, and so is none at all."""
        if self.file is None or self.device.type != "cpu":
            return
        path, loaded = self.file
        with suppress(OSError):
            now = _state_of(path)
            if now != loaded and now[0] == loaded[0]:
                self.failure = Broken(
                    f"{path.name} was overwritten after it was loaded", "load the model again: scripts/models.py load"
                )
                self.state.update(now=True, state="failed", reason=str(self.failure))

    def _admit(self, row: dict[str, Any], index: int, items: dict[int, Item]) -> Reply | None:
        self._check_file()
        if isinstance(self.failure, OutOfMemory | Broken):
            raise self.failure.fresh()
        if self.failure is not None:
            raise Broken(f"the model did not load: {self.failure}", "mend the cause, then load the model again")
        if self.state:
            self.state.check_replacement()
        message, tensors = self.transport.receive(row)
        request = parse_request(message, (*self.accepts, Readiness))
        if isinstance(request, Readiness):
            return Reply(Ready(), {})
        item = Item(request, tensors)
        missing = self.missing(item)
        for name, key in request.references.items():
            if name in tensors:
                self.tensors.put(key, tensors[name])
            elif (kept := self.tensors.get(key)) is not None:
                tensors[name] = kept
            else:
                missing.append(key)
        if missing:
            return Reply(Missing(hashes=missing), {})
        self.check(item)
        items[index] = item
        return None

    def _groups(self, items: dict[int, Item]) -> list[list[int]]:
        groups: list[list[int]] = []
        growing: dict[Hashable, tuple[list[int], int]] = {}
        for index, item in items.items():
            key, size = self.group_key(item), self.batch_size(item)
            group, total = growing.get(key, ([], 0))
            if group and total + size > self.settings.batch_positions:
                group, total = [], 0
            if not group:
                groups.append(group)
            group.append(index)
            growing[key] = group, total + size
        return groups

    def _run_group(self, indices: list[int], items: dict[int, Item], outcomes: list) -> None:
        begun = time.monotonic()
        replies = self._guarded(lambda: self.run([items[index] for index in indices]))
        self.telemetry.ran(len(indices), time.monotonic() - begun)
        if isinstance(replies, LunaError) and len(indices) > 1:
            # Together they failed: alone, only those at fault do.
            for index in indices:
                self._run_group([index], items, outcomes)
        elif isinstance(replies, LunaError):
            outcomes[indices[0]] = replies
        else:
            for index, reply in zip(indices, replies, strict=True):
                outcomes[index] = reply

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """What `call` returns, or the LunaError that it came to."""
        try:
            return call()
        except LunaError as error:
            return error
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            return OutOfMemory(f"{self.device} has no memory left for this: {error}", "a smaller size or batch may fit")
        except Exception as error:
            log.exception("a request failed")
            return Internal(f"{type(error).__name__}: {error}", "the server's log has the whole story")

    def _encode(self, outcome: Reply | LunaError, row: dict[str, Any], context, index: int) -> bytes | bytearray:
        if isinstance(outcome, LunaError):
            context.set_response_content_type(index, JSON)
            context.set_response_status(outcome.status, type(outcome).__name__, index)
            if outcome.retry_after is not None:
                context.set_response_header(index, "Retry-After", str(max(1, round(outcome.retry_after))))
            return outcome.to_json()
        for name, amount in outcome.counters.items():
            context.metrics.add_counter(name, amount)
        for name, size in outcome.sizes.items():
            context.metrics.add_size(name, size, unit="B")
        if not outcome.tensors and is_plain_json(row):
            content_type, body = JSON, outcome.message.model_dump_json().encode()
        else:
            answer = self._guarded(lambda: self.transport.answer(row, Blob(outcome.message, outcome.tensors)))
            if isinstance(answer, LunaError):
                return self._encode(answer, row, context, index)
            content_type, body = answer
        context.set_response_content_type(index, content_type)
        if outcome.status != 200:
            context.set_response_status(outcome.status, HTTPStatus(outcome.status).phrase, index)
        return body


def _state_of(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns
