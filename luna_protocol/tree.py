"""Nested arguments and results as JSON and named tensors.

Dicts with string keys, lists, strings, finite numbers, booleans and None are JSON as they are. Everything else is an
object with one key that begins with "$":

    {"$tensor": "t0"}                 the tensor of that name in the same blob
    {"$tensor": "t0", "order": [..]}  one whose dimensions lie in another order in memory: kernels choose by strides
    {"$tuple": [..]}  {"$pairs": [[key, value], ..]}  {"$float": "inf"}  {"$size": [..]}  {"$dtype": "float16"}
    {"$device": null}                 the device that computes
    {"$uuid": hex}  {"$nested": [..]} ComfyUI's NestedTensor, by its parts
"""

import enum
import math
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luna_protocol.errors import Malformed

DTYPES = {
    str(dtype)[6:]: dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
MAX_NODES = 100_000
MAX_DEPTH = 64


class Unsendable(TypeError):
    """A value that is no data; the message says where it stands and what it is."""


class TreeWriter:
    """Writes one or several values of a message; `tensors` are those that have to travel beside it.

    A tensor that occurs twice is sent once, and is one tensor again on the other side.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def write(self, value: Any, path: str = "value") -> Any:
        """`value` as a tree.

        Raises:
            Unsendable: it holds what is no data, such as a function.
        """
        if isinstance(value, enum.Enum):
            raise Unsendable(f"{path} is {value!r}")
        if value is None or isinstance(value, bool | str | int):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, torch.Size):
            return {"$size": list(value)}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value)[6:]}
        if isinstance(value, torch.device):
            return {"$device": None}
        if isinstance(value, uuid.UUID):
            return {"$uuid": value.hex}
        if type(value) in (list, tuple):
            items = [self.write(item, f"{path}[{index}]") for index, item in enumerate(value)]
            return items if type(value) is list else {"$tuple": items}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: self.write(item, f"{path}.{key}") for key, item in value.items()}
            return {"$pairs": [[self.write(k, path), self.write(v, f"{path}[{k!r}]")] for k, v in value.items()]}
        if type(value).__name__ == "NestedTensor" and hasattr(value, "tensors"):
            return {"$nested": [self.write(part, f"{path}[{index}]") for index, part in enumerate(value.tensors)]}
        raise Unsendable(f"{path} is a {type(value).__module__}.{type(value).__qualname__}")

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise Unsendable(f"{path} is a {type(tensor).__module__}.{type(tensor).__qualname__}")
        if (known := self._seen.get(id(tensor))) is not None:
            return known[1]
        name = f"t{len(self.tensors)}"
        order = sorted(range(tensor.ndim), key=lambda dim: (-tensor.stride(dim), dim))
        as_in_memory = tensor.permute(order)
        node: dict[str, Any] = {"$tensor": name}
        if order != list(range(tensor.ndim)) and as_in_memory.is_contiguous():
            node["order"] = order
            self.tensors[name] = as_in_memory.detach()
        else:
            self.tensors[name] = tensor.detach()
        # The tensor is kept, so that no other takes its id meanwhile.
        self._seen[id(tensor)] = tensor, node
        return node


def read_tree(
    tree: Any,
    tensors: dict[str, Tensor],
    device: torch.device | None = None,
    nested: Callable[[Sequence[Tensor]], Any] | None = None,
) -> Any:
    """The value that `tree` stands for.

    Args:
        tensors: what came beside it.
        device: where its tensors are to be; None leaves them where they are.
        nested: makes a NestedTensor of its parts.

    Raises:
        Malformed: an unknown tag, a tensor that did not come, or more than `MAX_NODES` or `MAX_DEPTH`.
    """
    return _Reader(tensors, device, nested).read(tree, 0)


class _Reader:
    def __init__(self, tensors: dict[str, Tensor], device: torch.device | None, nested: Callable | None) -> None:
        self._tensors, self._device, self._nested = tensors, device, nested
        self._nodes = 0
        self._moved: dict[tuple, Tensor] = {}

    def read(self, node: Any, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise _wrong(f"it has more than {MAX_NODES} values, or more than {MAX_DEPTH} levels")
        if isinstance(node, list):
            return [self.read(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        tags = [key for key in node if key.startswith("$")]
        if not tags:
            return {key: self.read(item, depth + 1) for key, item in node.items()}
        try:
            return self._tagged(tags[0], node, depth + 1)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _wrong(f"{str(node)[:80]}: {type(error).__name__}: {error}") from error

    def _tagged(self, tag: str, node: dict[str, Any], depth: int) -> Any:
        content = node[tag]
        match tag:
            case "$tensor":
                return self._tensor(content, tuple(node.get("order", ())))
            case "$tuple":
                return tuple(self.read(item, depth) for item in content)
            case "$pairs":
                return {self.read(key, depth): self.read(value, depth) for key, value in content}
            case "$float":
                return float(content)
            case "$size":
                return torch.Size(content)
            case "$dtype":
                return DTYPES[content]
            case "$device":
                return self._device
            case "$uuid":
                return uuid.UUID(hex=content)
            case "$nested" if self._nested:
                return self._nested([self.read(part, depth) for part in content])
        raise ValueError("an unknown tag")

    def _tensor(self, name: str, order: tuple[int, ...]) -> Tensor:
        key = (name, order)
        if key not in self._moved:
            tensor = self._tensors[name]
            if self._device is not None:
                tensor = tensor.to(self._device)
            if order:
                tensor = tensor.permute([order.index(dim) for dim in range(len(order))])
            self._moved[key] = tensor
        return self._moved[key]


def _wrong(reason: str) -> Malformed:
    return Malformed(f"a tree cannot be read: {reason}", "its form is described in docs/protocol.md")
