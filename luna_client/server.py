"""A LunaServe server as its clients see it: inference and management over REST. Needs nothing of ComfyUI or TorchServe.

    server = Server()
    reply, tensors = server.call("sd15.unet", UNetForward(), {"x": x, "timesteps": t, "context": context})

Every fault is a `LunaError`, whether our own handlers told it or TorchServe did.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from luna_client.manager import Manager
from luna_client.transport import Transport
from luna_protocol import MAX_BODY_BYTES
from luna_protocol.blob import MAX_HEADER_BYTES, Blob
from luna_protocol.errors import Internal
from luna_protocol.messages import Missing, Request, validate

_WORKERS = 16
_MAX_TENSORS = 8192  # of which the header names each


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
        always = {name: tensor for name, tensor in tensors.items() if hashes[name] is None}
        sent = always
        # Each of a model's workers may lack each hash, and a body may have room for one at a time.
        for _ in range(2 + _WORKERS * len(set(hashes.values()))):
            message, reply = self._transport.ask(Blob(request, sent), lambda body: self._predict(model, body))
            if message.get("kind") != "missing":
                return message, reply
            missing = validate(Missing, message).hashes
            lacking = {name: tensor for name, tensor in tensors.items() if hashes[name] in missing}
            if not lacking.keys() - sent.keys():
                break
            sent = _filled(always, lacking | sent, hashes)
        raise Internal(f"{model} asks for tensors that it was sent, or that this request lacks: {missing}")

    @property
    def shares_memory(self) -> bool:
        """As `Transport.shares_memory`."""
        return self._transport.shares_memory


def _filled(always: dict[str, Tensor], wanted: dict[str, Tensor], hashes: dict[str, str | None]) -> dict[str, Tensor]:
    """Of the `wanted` tensors what one body can hold, and at least the first hash's. Workers keep what came."""
    sets: dict[str, dict[str, Tensor]] = {}
    for name, tensor in wanted.items():
        if name not in always:
            sets.setdefault(hashes[name], {})[name] = tensor
    portion = dict(always)
    for tensors in sets.values():
        grown = portion | tensors
        too_much = sum(tensor.nbytes for tensor in grown.values()) > MAX_BODY_BYTES - MAX_HEADER_BYTES
        if len(portion) > len(always) and (too_much or len(grown) > _MAX_TENSORS):
            break
        portion = grown
    return portion


def _known_as(tensor: str, request: Request) -> str | None:
    """The hash that stands for a tensor, or None where it always travels."""
    if tensor.startswith("lora."):
        return tensor.split(".", 2)[1]
    return request.references.get(tensor)
