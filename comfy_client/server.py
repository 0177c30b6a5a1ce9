"""A LunaServe server as its clients see it: inference and management over REST. Needs nothing of ComfyUI or TorchServe.

    server = Server()
    reply, tensors = server.call("sd15.unet", UNetForward(), {"x": x, "timesteps": t, "context": context})

Every fault is a `LunaError`, whether our own handlers told it or TorchServe did.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from comfy_client.manager import Manager
from comfy_client.transport import Transport
from luna_protocol.blob import Blob
from luna_protocol.errors import Internal
from luna_protocol.messages import Missing, Request, validate


class Server(Manager):
    """One server, with its models' tensors."""

    @cached_property
    def _transport(self) -> Transport:
        return Transport(self.inference)

    def call(
        self, model: str, request: Request, tensors: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
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


def _known_as(tensor: str, request: Request) -> str | None:
    """The hash that stands for a tensor, or None where it always travels."""
    if tensor.startswith("lora."):
        return tensor.split(".", 2)[1]
    return request.references.get(tensor)
