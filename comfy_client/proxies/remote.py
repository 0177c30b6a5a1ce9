"""A served model as its proxy uses it: one call at a time, and ComfyUI's cancel button ends the wait."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from comfy import model_management
from torch import Tensor

from comfy_client.notice import warn
from luna_client.replicas import Replicas
from luna_client.server import Server
from luna_protocol.messages import DescribeModel, ModelDescription, Request, ServedModel, validate

log = logging.getLogger(__name__)

_INTERRUPT_POLL_SECONDS = 0.05
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Remote:
    """One served model.

    Attributes:
        description: its shapes and family as they were when the proxy was made.
    """

    description: ModelDescription
    replicas: Replicas
    _told: set[str] = field(default_factory=set)

    @classmethod
    def find(cls, server: Server, names: tuple[str, ...]) -> "Remote":
        """Ask the server what the model with these replicas is made of.

        Raises:
            NotFound: the server's store does not have it.
        """
        message = server.ask(DescribeModel(model=names[0]))
        return cls(validate(ModelDescription, message), Replicas(server, names))

    @property
    def model(self) -> ServedModel:
        return self.description.model

    @property
    def dtype(self) -> torch.dtype:
        """What its workers compute in; float32 while none is loaded."""
        return next((_DTYPES[worker.dtype] for worker in self.model.workers if worker.dtype), torch.float32)

    def meta_tensors(self, component: str) -> dict[str, Tensor]:
        """{key without prefix: tensor on the meta device}: names, shapes and dtype, no weights."""
        shapes = self.description.shapes[component]
        return {key: torch.empty(shape, dtype=self.dtype, device="meta") for key, shape in shapes.items()}

    def ask(
        self, request: Request, tensors: Mapping[str, Tensor], settled: bool = False
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The reply's message and tensors, by the replica that is least busy now or, once `settled`, by the same again.

        Raises:
            InterruptProcessingException: the user cancelled.
            LunaError: whatever the server told.
        """

        def call() -> tuple[dict[str, Any], dict[str, Tensor]]:
            if not settled:
                self.replicas.settle()
            return self.replicas.call(request, tensors)

        message, reply = interruptible(call, self.replicas.server.abort)
        for report in message.get("lora", []):
            self._warn_of(report)
        return message, reply

    def _warn_of(self, report: dict[str, Any]) -> None:
        """Name once in the log what is not applied of a LoRA."""
        lora, unmatched, skipped = (report.get("name") or report["content"], report["unmatched"], report["skipped"])
        if not (unmatched or skipped) or lora in self._told:
            return
        self._told.add(lora)
        if report["name"] and not report["matched"]:  # what has no name is a part of what ComfyUI's loader took
            warn(f"LoRA {lora} changes nothing in {self.model.name}: is it for another family?")
        if skipped:
            layers = "; ".join(report["skipped_layers"][:5])
            log.warning("LoRA %s: %d layers cannot be applied to %s: %s", lora, skipped, self.model.name, layers)
        if unmatched:
            names = ", ".join(report["unmatched_names"][:5])
            log.warning("LoRA %s: %d tensors fit nothing in %s: %s", lora, unmatched, self.model.name, names)


def interruptible(call: Callable[[], Result], abort: Callable[[int], None] = lambda thread: None) -> Result:
    """What `call` returns.

    It runs in a thread of its own, because nothing can end a blocking read early: when the user cancels, `abort` is
    given that thread's id, the thread is left behind and its outcome dropped.

    Raises:
        InterruptProcessingException: the user cancelled.
    """
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="luna call", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_INTERRUPT_POLL_SECONDS)
        try:
            model_management.throw_exception_if_processing_interrupted()
        except BaseException:
            abort(thread.ident)
            raise
    if failure:
        # Taken out, as its traceback holds this frame: the two would keep each other, and all that the run held.
        raise failure.pop()
    return outcome[0]
