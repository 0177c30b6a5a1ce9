"""Serves a VAE: encode and decode, whole or tiled; and decode and save, later, by way of the queue."""

from collections.abc import Hashable

import torch
from torch import Tensor

from engine.checkpoints import detect, read_header
from engine.role import Item, Reply, Role
from engine.saving.decode_worker import DecodeWorker
from engine.saving.decoding import decode_picture
from engine.saving.picture_records import PictureRecords
from engine.saving.queue_metrics import QueueMetrics
from engine.saving.queue_requests import QUEUE_REQUESTS, answer, open_queue
from engine.saving.watcher import Watcher
from engine.vae import SCALE, VAE
from engine.weights import Weights
from luna_protocol.errors import Impossible, TooLarge
from luna_protocol.messages import Request, VaeDecode, VaeEncode, VaeOutput
from luna_protocol.save_job import SaveJob

MAX_PIXELS = 16 * 4096 * 4096  # over all rows of one request


class VaeRole(Role):
    accepts = (VaeEncode, VaeDecode, SaveJob, *QUEUE_REQUESTS)

    def load(self) -> None:
        self.vae = self._read()
        self.weights = Weights(self.vae.model, lambda: self._read().model)

    def open(self) -> None:
        self.queue = open_queue(self.settings)
        spool = self.settings.roots.spool.resolve()
        self._worker = DecodeWorker(
            self.queue,
            self._decode_job,
            model=self.settings.checkpoint,
            records=PictureRecords(self.settings.pictures_database or f"sqlite:///{spool / 'pictures.sqlite3'}"),
            watcher=Watcher(self.settings.watcher) if self.settings.watcher else None,
            observe=QueueMetrics(self.around.observe, self.queue).observe,
        )
        self._worker.start()

    def close(self) -> None:
        self._worker.stop()
        self.queue.close()

    def _read(self) -> VAE:
        path = self.settings.checkpoint_path()
        return VAE.load(path, detect(read_header(path)).parts["vae"], self.dtype, self.device)

    def warm_up(self) -> None:
        pixels = self.vae.decode(torch.zeros(1, self.vae.latent_channels, 8, 8, dtype=self.dtype, device=self.device))
        self.vae.encode(pixels)

    def answers_at_once(self, request: Request) -> bool:
        return not isinstance(request, VaeEncode | VaeDecode)

    def check(self, item: Item) -> None:
        if not isinstance(item.request, VaeEncode | VaeDecode):
            return
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
        if not isinstance(item.request, VaeEncode | VaeDecode):
            return id(item)
        tensor = item.tensors[_name(item)]
        return (
            item.request.model_dump_json(exclude={"references"}),
            tensor.shape[1:],
            tensor.dtype,
            tensor.stride()[1:],
        )

    def run(self, items: list[Item]) -> list[Reply]:
        request = items[0].request
        if isinstance(request, SaveJob):
            accepted = self.queue.submit(
                request, items[0].tensors, self.settings.checkpoint, self.vae.latent_channels, SCALE
            )
            return [Reply(accepted, {}, status=202)]
        if isinstance(request, QUEUE_REQUESTS):
            return [Reply(answer(self.queue, request), {})]
        return self._encode_or_decode(items)

    def _decode_job(self, latent: Tensor) -> Tensor:
        return self.around.compute(lambda: decode_picture(self.vae, latent, self.settings.tile_pixels))

    def _encode_or_decode(self, items: list[Item]) -> list[Reply]:
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
