"""VAE: ComfyUI's own batching, tiling and padding around an autoencoder that runs on the server."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy import model_management
from comfy.sd import VAE
from torch import Tensor, nn

from comfy_client.proxies.patcher import LoraStack, RemotePatcher
from comfy_client.proxies.refusals import refuse
from comfy_client.proxies.remote import Remote
from luna_client.row_groups import in_groups
from luna_protocol.errors import OutOfMemory
from luna_protocol.messages import Request, VaeDecode, VaeEncode


class RemoteVAE(VAE):
    """A VAE whose encode and decode are requests; whole pictures, and each tile where ComfyUI tiles."""

    def __init__(self, remote: Remote) -> None:
        with _without_warnings():  # the stock constructor misses the weights
            super().__init__(sd={})
        self.first_stage_model = RemoteAutoencoder(remote)
        self.latent_channels = _latent_channels(remote.description.shapes["vae"])
        self.vae_dtype = remote.dtype
        self.device = model_management.vae_device()
        self.output_device = model_management.intermediate_device()
        self.memory_used_encode = self.memory_used_decode = _next_to_nothing
        self.patcher = RemotePatcher.around(self.first_stage_model)

    def get_sd(self):
        refuse("VAESave or CheckpointSave", "reads the weights")


class RemoteAutoencoder(nn.Module):
    """ComfyUI's `first_stage_model` without parameters."""

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self.remote = remote
        self.lora_stack = LoraStack()

    def encode(self, pixels: Tensor) -> Tensor:
        """Latent [B, C, H/8, W/8] of pixels [B, 3, H, W] in -1..1."""
        return self._ask(VaeEncode(), "pixels", pixels, "latent")

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels [B, 3, 8h, 8w] about -1..1 of latent [B, C, h, w]."""
        return self._ask(VaeDecode(), "latent", latent, "pixels")

    def _ask(self, request: Request, name: str, tensor: Tensor, reply: str) -> Tensor:
        def ask(rows: list[int], group: str) -> Tensor:
            _, tensors = self.remote.ask(request, {name: tensor[rows] if group else tensor})
            return tensors[reply]

        try:
            return in_groups(ask, len(tensor), 1, len(tensor))[0].to(tensor.device)
        except OutOfMemory as error:
            # ComfyUI's own answer to this exception is to go on tile by tile.
            raise model_management.OOM_EXCEPTION(str(error)) from error


def _next_to_nothing(*_args: Any, **_options: Any) -> int:
    """Bytes wanted of this machine; not 0, because ComfyUI divides by it."""
    return 1


def _latent_channels(shapes: dict[str, list[int]]) -> int:
    decoder = "taesd_decoder.1.weight" if "taesd_decoder.1.weight" in shapes else "decoder.conv_in.weight"
    return shapes[decoder][1]


@contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
