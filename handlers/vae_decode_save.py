"""Serves a VAE: encode and decode, whole or tiled."""

from collections.abc import Hashable

import torch

from handlers.engine.checkpoints import detect, read_header
from handlers.engine.vae import SCALE, VAE
from handlers.role_handler import Item, Reply, RoleHandler
from protocol.errors import Impossible, TooLarge
from protocol.messages import VaeDecode, VaeEncode, VaeOutput

MAX_PIXELS = 16 * 4096 * 4096  # over all rows of one request


class VaeHandler(RoleHandler):
    accepts = (VaeEncode, VaeDecode)

    def load(self) -> None:
        path = self.settings.checkpoint_path()
        self.vae = VAE.load(path, detect(read_header(path)).parts["vae"], self.dtype, self.device)

    def weights_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.vae.model.parameters())

    def check(self, item: Item) -> None:
        decoding = isinstance(item.request, VaeDecode)
        tensor = item.take(_name(item), 4)
        self.vae.check_latent(tensor) if decoding else self.vae.check_pixels(tensor)
        pixels = tensor.shape[0] * tensor.shape[2] * tensor.shape[3] * (SCALE * SCALE if decoding else 1)
        if pixels > MAX_PIXELS:
            raise TooLarge(f"{pixels} pixels in one request", f"send at most {MAX_PIXELS}")
        tiling = item.request.tiling
        if tiling and tiling.overlap >= tiling.tile_size:
            raise Impossible(f"overlap {tiling.overlap} of tiles of {tiling.tile_size}", "the overlap must be smaller")

    def group_key(self, item: Item) -> Hashable:
        tensor = item.tensors[_name(item)]
        return (
            item.request.model_dump_json(exclude={"references"}),
            tensor.shape[1:],
            tensor.dtype,
            tensor.stride()[1:],
        )

    def run(self, items: list[Item]) -> list[Reply]:
        name = _name(items[0])
        tensors = [item.tensors[name] for item in items]
        # Joined only when there are several: joining forgets strides, and with them the last bits.
        joined = (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(self.device, self.dtype)
        tiling = items[0].request.tiling
        if isinstance(items[0].request, VaeDecode):
            output, name = self.vae.decode(joined, tiling), "pixels"
        else:
            output, name = self.vae.encode(joined, tiling), "latent"
        parts = output.cpu().split([len(tensor) for tensor in tensors])
        return [Reply(VaeOutput(), {name: part}) for part in parts]


def _name(item: Item) -> str:
    return "latent" if isinstance(item.request, VaeDecode) else "pixels"
