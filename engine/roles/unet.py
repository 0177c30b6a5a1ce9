"""Serves a UNet: `UNetForward` in, `UNetOutput` out."""

import math
from collections.abc import Hashable
from itertools import islice

import torch
from torch import Tensor

from engine.checkpoints import detect, read_header
from engine.lora.names import unet_targets
from engine.role import Item, Reply
from engine.roles.patched import PatchedRole, refuse_unknown
from engine.step_cache import Outcome, Row, StepCache, rows_of
from engine.step_presets import Presets
from engine.unet import Control, UNet
from engine.weights import Weights
from luna_protocol.errors import Impossible, Malformed
from luna_protocol.messages import MAX_ROWS, StepCacheReport, UNetForward, UNetOutput

MAX_LATENT_POSITIONS = 1024 * 1024  # 8192 x 8192 pixels a row
_PLACES = ("input", "middle", "output")


class UNetRole(PatchedRole):
    accepts = (UNetForward,)

    def load(self) -> None:
        path = self.settings.checkpoint_path()
        self.unet = self._read()
        self.unet.between_blocks = self.around.between_blocks
        self.weights = Weights(self.unet.model, lambda: self._read().model)
        self.step_cache = StepCache(self.unet, self.settings.step_cache_mb << 20, self.settings.step_cache_ttl)
        self.presets = Presets.load(path)
        self.take_loras(self.unet.model, unet_targets(self.unet.names))

    def caches_bytes(self) -> int:
        return super().caches_bytes() + self.step_cache.bytes

    def drop_caches(self) -> None:
        super().drop_caches()
        self.step_cache.clear()

    def _read(self) -> UNet:
        path = self.settings.checkpoint_path()
        return UNet.load(path, detect(read_header(path)).parts["unet"], self.dtype, self.device)

    def warm_up(self) -> None:
        if self.settings.compile:
            from engine.compilation import compile_blocks  # with the compiler, which takes seconds

            # A single row is a case of its own; so would be a single position, to which smaller sides shrink.
            compile_blocks(self.unet.model, lambda: [self._run_zeros(rows, 16) for rows in (2, 1)])
        # A GPU chooses its kernels by size, so cond and uncond of the usual picture; a CPU would take long for those.
        usual = 64 if self.unet.layout.adm_channels is None else 128
        self._run_zeros(2, 8 if self.device.type == "cpu" else usual)

    def _run_zeros(self, rows: int, side: int) -> None:
        layout = self.unet.layout
        x = torch.zeros(rows, layout.in_channels, side, side, dtype=self.dtype, device=self.device)
        context = x.new_zeros(rows, 77, layout.context_dim)
        y = None if layout.adm_channels is None else x.new_zeros(rows, layout.adm_channels)
        self.unet.forward(x, x.new_zeros(rows, dtype=torch.float32), context, y)

    def check(self, item: Item[UNetForward]) -> None:
        x, timesteps, context = item.take("x", 4), item.take("timesteps", 1), item.take("context", 3)
        layout = self.unet.layout
        rows, channels, *sides = x.shape
        if channels != layout.in_channels:
            raise Impossible(f"x has {channels} channels", f"this UNet takes {layout.in_channels}")
        if not 1 <= rows <= MAX_ROWS or 0 in sides or sides[0] * sides[1] > MAX_LATENT_POSITIONS:
            raise Impossible(f"x has shape {list(x.shape)}", f"send 1 to {MAX_ROWS} rows of at most 1024 x 1024")
        if context.shape[2] != layout.context_dim or not context.shape[1]:
            raise Impossible(
                f"context has shape {list(context.shape)}", f"this UNet takes [B, T, {layout.context_dim}]"
            )
        if not all(map(math.isfinite, timesteps.tolist())):
            raise Impossible(f"timesteps are {timesteps.tolist()}", "every one must be a finite number")
        sent = {"timesteps": timesteps, "context": context}
        if layout.adm_channels is not None:
            sent["y"] = item.take("y", 2)
            if sent["y"].shape[1] != layout.adm_channels:
                raise Impossible(f"y has width {sent['y'].shape[1]}", f"this UNet takes {layout.adm_channels}")
        elif "y" in item.tensors:
            raise Impossible("y was sent to a UNet without vector conditioning", "send y to SDXL models only")
        residuals = {name: tensor for name, tensor in item.tensors.items() if name.startswith("control.")}
        refuse_unknown(item, ("x", *sent, *residuals))
        sent |= residuals
        for name, tensor in sent.items():
            if not tensor.ndim or len(tensor) != rows:
                raise Impossible(f"{name} has shape {list(tensor.shape)}", f"x has {rows} rows, so must {name}")
        self._check_control(_control(item.tensors), *sides)
        self._cache_rows(item)

    def _check_control(self, control: Control, height: int, width: int) -> None:
        for place, shapes in self.unet.control_shapes(height, width).items():
            residuals = control.get(place, [])
            if len(residuals) > len(shapes):
                raise Impossible(
                    f"there is a residual control.{place}.{len(residuals) - 1}",
                    f"this UNet has {len(shapes)} {place} blocks, counted from 0",
                )
            for index, (residual, shape) in enumerate(zip(residuals, shapes, strict=False)):
                if residual is not None and residual.shape[1:] != shape:
                    raise Impossible(
                        f"control.{place}.{index} has shape {list(residual.shape)}",
                        f"this UNet adds [B, {', '.join(map(str, shape))}] there: is the ControlNet of this family?",
                    )

    def rows(self, item: Item[UNetForward]) -> int | None:
        # The side path finds a row's LoRAs by its place in the batch, which the step cache takes apart, and works by
        # hooks, which compiled blocks do not run.
        return None if item.request.step_cache or self.settings.compile else len(item.tensors["x"])

    def group_key(self, item: Item[UNetForward]) -> Hashable:
        tensors = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(item.tensors.items()))
        return tensors, item.request.free_u

    def batch_size(self, item: Item[UNetForward]) -> int:
        rows, _, height, width = item.tensors["x"].shape
        return rows * height * width

    def run_patched(self, items: list[Item[UNetForward]]) -> list[Reply]:
        joined = {name: self._joined(items, name) for name in items[0].tensors}
        y = joined.get("y")
        out, outcomes = self.step_cache.forward(
            joined["x"].to(self.dtype),
            joined["timesteps"].float(),
            joined["context"].to(self.dtype),
            None if y is None else y.to(self.dtype),
            _control(joined),
            [row for item in items for row in self._cache_rows(item)],
            items[0].request.free_u,
        )
        parts = out.cpu().split([len(item.tensors["x"]) for item in items])
        outcomes = iter(outcomes)
        return [_reply(item, part, list(islice(outcomes, len(part)))) for item, part in zip(items, parts, strict=True)]

    def _cache_rows(self, item: Item[UNetForward]) -> list[Row | None]:
        cache, count = item.request.step_cache, len(item.tensors["x"])
        if cache is None:
            return [None] * count
        if len(cache.conds) != count:
            raise Impossible(f"step_cache names {len(cache.conds)} conds", f"x has {count} rows, so must conds")
        policy, window = self.presets.resolve(cache)
        self.step_cache.check(policy)
        return rows_of(cache.session, cache.step, cache.conds, policy, window, variant=item.stack)

    def _joined(self, items: list[Item], name: str) -> Tensor:
        # Not waited for: the client keeps its memory as it is until it has the reply, which takes these copies' stream.
        tensors = [item.tensors[name].to(self.device, non_blocking=True) for item in items]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _reply(item: Item[UNetForward], out: Tensor, outcomes: list[Outcome]) -> Reply:
    if item.request.step_cache is None:
        return Reply(UNetOutput(), {"out": out})
    hits = [outcome.hit for outcome in outcomes]
    saved = sum(outcome.seconds_saved for outcome in outcomes)
    counters = {
        "StepCacheHits": sum(hits),
        "StepCacheMisses": len(hits) - sum(hits),
        "StepCacheSecondsSaved": saved,
    }
    return Reply(UNetOutput(step_cache=StepCacheReport(hits=hits, seconds_saved=saved)), {"out": out}, counters)


def _control(tensors: dict[str, Tensor]) -> Control:
    """{place: residuals by index} from tensors named control.PLACE.INDEX."""
    control: dict[str, list[Tensor | None]] = {}
    for name, tensor in tensors.items():
        if not name.startswith("control."):
            continue
        _, place, index = [*name.split("."), "", ""][:3]
        if place not in _PLACES or not index.isdecimal() or len(index) > 2:
            raise Malformed(f"a tensor is called {name!r}", f"control residuals are control.{{{','.join(_PLACES)}}}.N")
        residuals = control.setdefault(place, [])
        residuals += [None] * (int(index) + 1 - len(residuals))
        residuals[int(index)] = tensor
    return control
