"""A served model as its proxy uses it: one call at a time, and ComfyUI's cancel button ends the wait."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from comfy import model_management
from torch import Tensor

from comfy_client.server import Server
from protocol.messages import DescribeModel, ModelDescription, Request, ServedModel, validate

_INTERRUPT_POLL_SECONDS = 0.05
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Remote:
    """One served model.

    Attributes:
        description: its shapes and family as they were when the proxy was made.
    """

    server: Server
    description: ModelDescription

    @classmethod
    def find(cls, server: Server, name: str) -> "Remote":
        """Ask the server what `name` is made of.

        Raises:
            NotFound: the server's store does not have it.
        """
        message, _ = server.call("repository", DescribeModel(model=name))
        return cls(server, validate(ModelDescription, message))

    @property
    def model(self) -> ServedModel:
        return self.description.model

    @property
    def dtype(self) -> torch.dtype:
        """What its workers compute in; float32 while none is loaded."""
        return next((DTYPES[worker.dtype] for worker in self.model.workers if worker.dtype), torch.float32)

    def meta_tensors(self, component: str) -> dict[str, Tensor]:
        """{key without prefix: tensor on the meta device}: names, shapes and dtype, no weights."""
        shapes = self.description.shapes[component]
        return {key: torch.empty(shape, dtype=self.dtype, device="meta") for key, shape in shapes.items()}

    def ask(self, request: Request, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reply's tensors.

        The call runs in a thread of its own, because nothing can end a blocking read early: when the user cancels, it
        is left behind, and its reply is dropped.

        Raises:
            InterruptProcessingException: the user cancelled.
            LunaError: whatever the server told.
        """
        outcome: list[dict[str, Tensor] | BaseException] = []

        def call() -> None:
            try:
                outcome.append(self.server.call(self.model.name, request, tensors)[1])
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=call, name=f"luna {self.model.name}", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_INTERRUPT_POLL_SECONDS)
            model_management.throw_exception_if_processing_interrupted()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]
