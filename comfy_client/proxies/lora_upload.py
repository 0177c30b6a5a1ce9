"""LoRA patches as ComfyUI's loaders parsed them, written back as the tensors of a LoRA file: what a server can read.

Any loader's product travels this way, whichever format its file had and wherever the file lies.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from comfy_client.proxies.refusals import refuse
from luna_client.row_groups import PART_BYTES
from luna_protocol.blob import set_hash

# The order in which ComfyUI's weight adapters keep what they read, by their `name`, under the names files use.
_SLOTS = {
    "lora": ("lora_up.weight", "lora_down.weight", "alpha", "lora_mid.weight", "dora_scale", "reshape_weight"),
    "loha": ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "dora_scale"),
    "lokr": (
        "lokr_w1",
        "lokr_w2",
        "alpha",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
        "dora_scale",
    ),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha", "dora_scale"),
    "oft": ("oft_blocks", "rescale", "alpha", "dora_scale"),
    "boft": ("oft_blocks", "rescale", "alpha", "dora_scale"),
}


class CapturedLora:
    """What loaders added to a model with the same strengths, serialised when first needed.

    Args:
        patches: {key of ComfyUI's state dict, or (key, slice of the weight, ...): any patch that `add_patches` takes}.
    """

    def __init__(self, patches: Mapping[Any, Any]) -> None:
        self._patches = dict(patches)
        self._weights = frozenset(map(_weight, self._patches))

    def is_apart_from(self, other: "CapturedLora") -> bool:
        """Whether the two patch no weight in common, so that their order makes no difference."""
        return self._weights.isdisjoint(other._weights)

    def joined(self, other: "CapturedLora") -> "CapturedLora":
        """Both, which are apart."""
        return CapturedLora(self._patches | other._patches)

    @cached_property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """{hash that stands for the tensors: {name in a LoRA file: tensor}}.

        Several where there are more than `PART_BYTES`: a request body holds one at a time. Each layer is in one of
        them, so that they add up to the whole.
        """
        parts: list[dict[str, Tensor]] = [{}]
        room = PART_BYTES
        for key, patch in self._patches.items():
            tensors = lora_file({key: patch})
            size = sum(tensor.nbytes for tensor in tensors.values())
            if size > room and parts[-1]:
                parts.append({})
                room = PART_BYTES
            parts[-1] |= tensors
            room -= size
        return {set_hash(part): part for part in parts}


def add_captured(stack: list[tuple], lora: CapturedLora, strength_patch: float, strength_model: float) -> None:
    """Append to a stack of stock patch tuples, or join an entry of the same strengths that no later one overlaps.

    Loaders that weigh blocks add each of hundreds of layers by itself; what has no order stays one LoRA for the server.
    """
    for index in reversed(range(len(stack))):
        strength, other, of_model, *_ = stack[index]
        if not isinstance(other, CapturedLora) or not lora.is_apart_from(other):
            break
        if (strength, of_model) == (strength_patch, strength_model):
            stack[index] = (strength_patch, other.joined(lora), strength_model, None, None)
            return
    stack.append((strength_patch, lora, strength_model, None, None))


def lora_file(patches: Mapping[Any, Any]) -> dict[str, Tensor]:
    """ComfyUI's patches as the tensors of a LoRA file whose layers have ComfyUI's own names.

    Raises:
        NotRemote: a patch of a kind that no LoRA file can hold, or one that changes a part of a weight.
    """
    tensors: dict[str, Tensor] = {}
    for key, patch in patches.items():
        if not isinstance(key, str):
            refuse(f"The LoRA patch of {key[0]}", "changes a slice of a weight")
        layer = key.removesuffix(".weight")
        tensors |= {f"{layer}.{slot}": value for slot, value in _slots(key, patch).items()}
    return tensors


def _weight(key: Any) -> str:
    return key if isinstance(key, str) else key[0]


def _slots(key: str, patch: Any) -> dict[str, Tensor]:
    if isinstance(patch, list):
        refuse(f"The merge of another model into {key} (ModelMergeSimple, for instance)", "reads the weights")
    if isinstance(patch, tuple):
        kind, values = patch if len(patch) == 2 else ("diff", patch)
        if kind == "diff" and values[0] is None:  # for strength_model alone
            return {"no_diff": torch.empty(0)}
        slot = {"diff": "diff", "set": "set_weight"}.get(kind)
        if slot is None or len(values) != 1:
            refuse(f"The patch of {key}", f"is of the kind {kind!r} and needs weights")
        return {slot: values[0]}
    if patch.name not in _SLOTS:
        refuse(f"The {patch.name} adapter of {key}", "is of a kind that needs weights")
    slots = _SLOTS[patch.name]
    if any(value is not None for value in patch.weights[len(slots) :]):
        refuse(f"The {patch.name} adapter of {key}", "has more tensors than its format had, and needs weights")
    return {slot: _tensor(value) for slot, value in zip(slots, patch.weights, strict=False) if value is not None}


def _tensor(value: Tensor | float | list[int]) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)
