"""Small random LoRAs of every format, for one layer at a time."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class _Draw:
    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, std: float = 0.2) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * std).to(self.dtype)


def _lora(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {"lora_up.weight": draw(out, 4, *[1] * len(kernel)), "lora_down.weight": draw(4, inner, *kernel)}


def _alpha(make: Callable, alpha: float) -> Callable:
    return lambda draw, *shape: make(draw, *shape) | {"alpha": torch.tensor(alpha)}


def _dora(make: Callable, axis: int) -> Callable:
    def made(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
        shape = [1] * (2 + len(kernel))
        shape[axis] = (out, inner)[axis]
        return make(draw, out, inner, kernel) | {"dora_scale": draw(*shape).abs() + 1}

    return made


def _tucker(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {
        "lora_up.weight": draw(out, 4, 1, 1),
        "lora_down.weight": draw(4, inner, 1, 1),
        "lora_mid.weight": draw(4, 4, *kernel),
    }


def _loha(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {
        name: draw(*shape)
        for i in (1, 2)
        for name, shape in ((f"hada_w{i}_a", (out, 3)), (f"hada_w{i}_b", (3, inner * prod(kernel))))
    }


def _loha_tucker(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {
        name: draw(*shape)
        for i in (1, 2)
        for name, shape in (
            (f"hada_w{i}_a", (3, out)),
            (f"hada_w{i}_b", (3, inner)),
            (f"hada_t{i}", (3, 3, *kernel)),
        )
    }


def _lokr(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {"lokr_w1": draw(4, 4), "lokr_w2": draw(out // 4, inner // 4, *kernel)}


def _lokr_low_rank(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    right = inner // 4 * prod(kernel)
    return {
        "lokr_w1_a": draw(4, 2),
        "lokr_w1_b": draw(2, 4),
        "lokr_w2_a": draw(out // 4, 3),
        "lokr_w2_b": draw(3, right),
    }


def _lokr_tucker(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {
        "lokr_w1": draw(4, 4),
        "lokr_w2_a": draw(3, out // 4),
        "lokr_w2_b": draw(3, inner // 4),
        "lokr_t2": draw(3, 3, *kernel),
    }


def _oft(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {"oft_blocks": draw(out // 8, 8, 8)}


def _boft(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {"oft_blocks": draw(3, out // 4, 4, 4), "rescale": draw(out, *[1] * (1 + len(kernel))) + 1}


def _glora(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    shapes = {"a1": (inner, 3), "a2": (3, inner), "b1": (out, 3), "b2": (3, inner * prod(kernel))}
    return {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}


def _old_glora(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    width = inner * prod(kernel)
    shapes = {"a1": (3, width), "a2": (width, 3), "b1": (3, width), "b2": (out, 3)}
    return {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}


def _diff(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {"diff": draw(out, inner, *kernel), "diff_b": draw(out)}


def _set(draw: _Draw, out: int, inner: int, kernel: tuple[int, ...]) -> Tensors:
    return {"set_weight": draw(out, inner, *kernel)}


FORMATS: dict[str, Callable[..., Tensors]] = {
    "lora": _alpha(_lora, 2.0),
    "lora without alpha": _lora,
    "lora tucker": _alpha(_tucker, 3.0),
    "lora dora out": _dora(_alpha(_lora, 2.0), 0),
    "lora dora in": _dora(_lora, 1),
    "loha": _alpha(_loha, 2.0),
    "loha tucker": _alpha(_loha_tucker, 1.0),
    "loha dora": _dora(_loha, 0),
    "lokr": _alpha(_lokr, 2.0),
    "lokr low rank": _alpha(_lokr_low_rank, 2.0),
    "lokr tucker": _lokr_tucker,
    "lokr dora": _dora(_lokr, 0),
    "oft": _oft,
    "oft bounded": _alpha(_oft, 0.5),
    "boft": _alpha(_boft, 0.8),
    "glora": _alpha(_glora, 2.0),
    "glora old": _old_glora,
    "diff": _diff,
    "set": _set,
}
ONLY_3X3 = ("lora tucker", "loha tucker", "lokr tucker")


def made(form: str, shape: torch.Size, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
    """{ending: tensor} of one layer's patch in this format; `shape` is the layer's weight's."""
    out, inner, *kernel = shape
    return FORMATS[form](_Draw(seed, dtype), out, inner, tuple(kernel))


def file_of(
    form: str, layers: dict[str, torch.Size], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a LoRA file of this format for {layer's name in the file: shape of its weight}."""
    return {
        f"{name}.{ending}": tensor
        for index, (name, shape) in enumerate(layers.items())
        for ending, tensor in made(form, shape, seed + index, dtype).items()
    }
