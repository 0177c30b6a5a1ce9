"""The UNet: diffusers' modules, frozen, run block by block in the original (LDM, ComfyUI) order.

Block by block because ControlNet residuals and step caches enter between blocks, at places that diffusers' own forward
does not offer. Bit-equal to diffusers' `UNet2DConditionModel` for SD1.x, and to ComfyUI for SDXL too (see `_load`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.checkpoints import Part
from engine.diffusers_modules import (
    Downsample2D,
    ResnetBlock2D,
    Transformer2DModel,
    UNet2DConditionModel,
    Upsample2D,
)
from engine.free_u import reweigh
from engine.unet_layout import UNetLayout
from engine.weights import adopt, read_tensors
from luna_protocol.messages import FreeU

Control = Mapping[str, list[Tensor | None]]


@dataclass
class Flow:
    """Rows on their way through the UNet, between two blocks.

    rows: their places in the batch, in the order in which the tensors hold them; h: [rows, c, h, w]; skips: what the
    output blocks still have to take up, first input block first; emb, context, control: as in `UNet`.
    """

    rows: list[int]
    h: Tensor
    skips: list[Tensor]
    emb: Tensor
    context: Tensor
    control: Control

    def select(self, indices: list[int]) -> "Flow":
        """The rows at these indices, copied."""
        return Flow(
            [self.rows[i] for i in indices],
            self.h[indices],
            [skip[indices] for skip in self.skips],
            self.emb[indices],
            self.context[indices],
            select_control(self.control, indices),
        )

    def join(self, other: "Flow") -> "Flow":
        """The rows of both, which stand before the same block."""
        if not self.rows:
            return other
        return Flow(
            self.rows + other.rows,
            torch.cat((self.h, other.h)),
            [torch.cat(pair) for pair in zip(self.skips, other.skips, strict=True)],
            torch.cat((self.emb, other.emb)),
            torch.cat((self.context, other.context)),
            {
                place: [
                    None if a is None else torch.cat((a, b))
                    for a, b in zip(residuals, other.control[place], strict=True)
                ]
                for place, residuals in self.control.items()
            },
        )


class Detours(Protocol):
    """Lets rows pass blocks by: they leave behind an input block and rejoin before an output block or the head."""

    def after_input(self, index: int, flow: Flow) -> Flow:
        """The rows that go on behind input block `index`."""

    def before_output(self, index: int, flow: Flow) -> Flow:
        """The rows that enter output block `index`; the head counts as one more."""


def select_control(control: Control, indices: list[int]) -> Control:
    """The residuals of the rows at `indices`."""
    return {place: [None if r is None else r[indices] for r in residuals] for place, residuals in control.items()}


class UNet:
    """A frozen UNet.

    Attributes:
        model: diffusers' module; its parameters are the base weights and are never written.
        layout: the structure read from the file.
        names: {key in the file, without prefix: parameter's name in `model`}.
        input_blocks, middle_block, output_blocks: modules of each block, in the file's numbering.
        between_blocks: is called before each block, and ends a forward by raising.
    """

    def __init__(self, model: UNet2DConditionModel, layout: UNetLayout, names: dict[str, str]):
        self.model = model
        self.layout = layout
        self.names = names
        self.input_blocks = _input_blocks(model)
        self.middle_block = _middle_block(model)
        self.output_blocks = _output_blocks(model)
        self.between_blocks: Callable[[], None] = lambda: None

    @classmethod
    def load(cls, path: Path, part: Part, dtype: torch.dtype, device: torch.device) -> "UNet":
        """Reads the UNet of a checkpoint straight to `device` as `dtype`.

        Raises:
            Malformed: the file's tensors do not make a UNet that is known.
        """
        return cls.build(read_tensors(path, part, "unet", dtype, device))

    @classmethod
    def build(cls, tensors: dict[str, Tensor]) -> "UNet":
        """A UNet of {name in the original layout: tensor}; raises as `load`."""
        layout = UNetLayout.from_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        names = layout.diffusers_names(tensors)
        with torch.device("meta"):
            model = UNet2DConditionModel(**layout.diffusers_config())
        adopt(model, {name: tensors[key] for key, name in names.items()}, "UNet")
        parameters = model.state_dict()
        names = {key: name for key, name in names.items() if name in parameters}
        if layout.use_linear:
            for name, module in model.named_modules():
                if name.endswith(".proj_in"):
                    # ComfyUI makes the tokens contiguous here, diffusers does not, and the product's last bits differ.
                    module.register_forward_pre_hook(_contiguous)
        return cls(model, layout, names)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.conv_in.weight.device

    def control_shapes(self, height: int, width: int) -> dict[str, list[tuple[int, int, int]]]:
        """{place: shapes [channels, h, w] of the residuals that can be added there, by index} for x [B, C, H, W]."""
        inputs = []
        for block in self.input_blocks:
            if isinstance(block[0], Downsample2D):
                height, width = (height + 1) // 2, (width + 1) // 2
            inputs.append((block[0].out_channels, height, width))
        return {"input": inputs, "middle": inputs[-1:], "output": inputs[::-1]}

    def embed(self, timesteps: Tensor, y: Tensor | None) -> Tensor:
        """The time embedding [B, E] of timesteps [B] and, where the family has it, y [B, A]."""
        embedding = self.model.time_embedding(self.model.time_proj(timesteps).to(self.dtype))
        return embedding if y is None else embedding + self.model.class_embedding(y)

    def run(
        self, block: list[nn.Module], h: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None
    ) -> Tensor:
        """One block: h [B, c, h, w] in and out; `size` is the spatial size that an upsampler has to reach."""
        self.between_blocks()
        for module in block:
            if isinstance(module, ResnetBlock2D):
                h = module(h, emb)
            elif isinstance(module, Transformer2DModel):
                h = module(h, encoder_hidden_states=context, return_dict=False)[0]
            elif isinstance(module, Upsample2D):
                h = module(h, output_size=size)
            else:
                h = module(h)
        return h

    def head(self, h: Tensor) -> Tensor:
        """The output head: norm, SiLU, convolution to [B, C, H, W]."""
        return self.model.conv_out(self.model.conv_act(self.model.conv_norm_out(h)))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        control: Control | None = None,
        detours: Detours | None = None,
        free_u: Sequence[FreeU] = (),
    ) -> Tensor:
        """The predicted noise (or v) [B, C, H, W].

        Args:
            x: [B, C, H, W], any H and W.
            timesteps: [B], 0..999, fractions allowed.
            context: [B, T, D].
            y: [B, A], SDXL only.
            control: residuals in ComfyUI's order: "input" added behind each input block, "middle" behind the middle
                block, "output" to each skip connection, deepest first. Missing and None entries add nothing.
            detours: what lets rows pass blocks by; without it, and where no row does, every row runs through all.
            free_u: what re-weighs what enters the output blocks, in this order.
        """
        flow = Flow(list(range(len(x))), x, [], self.embed(timesteps, y), context, control or {})
        for index, block in enumerate(self.input_blocks):
            if flow.rows:
                flow.h = _add(self.run(block, flow.h, flow.emb, flow.context), flow.control, "input", index)
                flow.skips.append(flow.h)
            if detours:
                flow = detours.after_input(index, flow)
        if flow.rows:
            flow.h = _add(self.run(self.middle_block, flow.h, flow.emb, flow.context), flow.control, "middle", 0)
        for index, block in enumerate(self.output_blocks):
            if detours:
                flow = detours.before_output(index, flow)
            if flow.rows:
                skip = _add(flow.skips.pop(), flow.control, "output", index)
                size = flow.skips[-1].shape[2:] if flow.skips else None
                h = flow.h
                for settings in free_u:
                    h, skip = reweigh(h, skip, self.model.conv_in.out_channels, settings)
                flow.h = self.run(block, torch.cat((h, skip), dim=1), flow.emb, flow.context, size)
        if detours:
            flow = detours.before_output(len(self.output_blocks), flow)
        out = self.head(flow.h)
        if flow.rows == sorted(flow.rows):
            return out
        return out[sorted(range(len(flow.rows)), key=flow.rows.__getitem__)]


def _add(h: Tensor, control: Control, place: str, index: int) -> Tensor:
    residuals = control.get(place, ())
    residual = residuals[index] if index < len(residuals) else None
    return h if residual is None else h + residual


def _contiguous(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def _layers(block: nn.Module) -> list[list[nn.Module]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return [[r] if a is None else [r, a] for r, a in zip(block.resnets, attentions, strict=True)]


def _input_blocks(model: UNet2DConditionModel) -> list[list[nn.Module]]:
    blocks: list[list[nn.Module]] = [[model.conv_in]]
    for down in model.down_blocks:
        blocks += _layers(down)
        blocks += [[sampler] for sampler in down.downsamplers or ()]
    return blocks


def _middle_block(model: UNet2DConditionModel) -> list[nn.Module]:
    mid = model.mid_block
    if mid is None:
        return []
    first, *rest = mid.resnets
    return [first, *(module for pair in zip(mid.attentions, rest, strict=True) for module in pair)] if rest else [first]


def _output_blocks(model: UNet2DConditionModel) -> list[list[nn.Module]]:
    blocks: list[list[nn.Module]] = []
    for up in model.up_blocks:
        blocks += _layers(up)
        blocks[-1] += list(up.upsamplers or ())
    return blocks
