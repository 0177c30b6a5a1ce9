"""LoRA beside the weights: the low-rank product is added to a layer's output, row by row, and nothing is merged.

For plain LoRAs on linear and convolutional layers only. It differs from merging in rounding alone: the product is
computed in the model's dtype and added to the activations instead of to the weights in float32.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.lora.merge import Scaled


@dataclass(frozen=True)
class LowRank:
    """All LoRAs of one stack on one layer, side by side: down [R, in, ...] and up [out, R, ...], strengths in `up`."""

    down: Tensor
    up: Tensor

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What the layer's output for x [rows, ...] gains."""
        if isinstance(layer, nn.Conv2d):
            mixed = F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
            return F.conv2d(mixed, self.up)
        return F.linear(F.linear(x, self.down), self.up)


def can_run(model: nn.Module, patches: Mapping[str, Sequence[Scaled]]) -> bool:
    """Whether these {parameter: patches} can run beside `model`."""
    return all(_is_plain(model, name, scaled) for name, on_one in patches.items() for scaled in on_one)


def low_rank(model: nn.Module, patches: Mapping[str, Sequence[Scaled]]) -> dict[str, LowRank]:
    """{layer: its low-rank pair} in the dtype and on the device of the layer's weight."""
    pairs = {}
    for name, on_one in patches.items():
        weight = model.get_parameter(name)
        inner = weight.shape[1:]
        downs, ups = [], []
        for scaled in on_one:
            up = scaled.patch.tensors["lora_up"].to(weight.device, torch.float32).flatten(1)
            down = scaled.patch.tensors["lora_down"].to(weight.device, torch.float32)
            alpha = scaled.patch.alpha
            ups.append(up * (scaled.strength * (1.0 if alpha is None else alpha / len(down))))
            downs.append(down.reshape(-1, *inner))
        up = torch.cat(ups, dim=1).to(weight.dtype)
        down = torch.cat(downs).to(weight.dtype)
        pairs[name.removesuffix(".weight")] = LowRank(down, up.view(*up.shape, *[1] * (weight.ndim - 2)))
    return pairs


@contextmanager
def beside(model: nn.Module, pairs: Sequence[Mapping[str, LowRank]], rows: Sequence[int]) -> Iterator[None]:
    """Adds pairs[i] to the outputs of the i-th `rows` rows of every batch that runs through `model` meanwhile."""
    with ExitStack() as hooks:
        for name in {name: None for each in pairs for name in each}:
            layer = model.get_submodule(name)
            handle = layer.register_forward_hook(_adding([each.get(name) for each in pairs], rows))
            hooks.callback(handle.remove)
        yield


def _is_plain(model: nn.Module, name: str, scaled: Scaled) -> bool:
    layer, _, leaf = name.rpartition(".")
    plain = scaled.patch.kind == "lora" and scaled.patch.tensors.keys() == {"lora_up", "lora_down"}
    fitting = leaf == "weight" and isinstance(model.get_submodule(layer), nn.Linear | nn.Conv2d)
    return plain and fitting and scaled.strength_model == 1


def _adding(pairs: Sequence[LowRank | None], rows: Sequence[int]):
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        start = 0
        for pair, count in zip(pairs, rows, strict=True):
            if pair is not None:
                output[start : start + count] += pair(layer, inputs[0][start : start + count])
            start += count

    return add
