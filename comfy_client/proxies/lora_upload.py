"""LoRA patches as ComfyUI's loaders parsed them, written back as the tensors of a LoRA file: what a server can read.

Any loader's product travels this way, whichever format its file had and wherever the file lies.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from comfy_client.proxies.refusals import refuse
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
    """What one loader added to a model, serialised when first needed.

    Args:
        patches: {key of ComfyUI's state dict: weight adapter, or ("diff" | "set", (tensor,))}.
    """

    def __init__(self, patches: Mapping[str, Any]) -> None:
        self._patches = patches

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """{name in a LoRA file: tensor}."""
        return lora_file(self._patches)

    @cached_property
    def content(self) -> str:
        """The hash that stands for `tensors`."""
        return set_hash(self.tensors)


def lora_file(patches: Mapping[str, Any]) -> dict[str, Tensor]:
    """ComfyUI's patches as the tensors of a LoRA file whose layers have ComfyUI's own names.

    Raises:
        NotRemote: a patch of a kind that no LoRA file can hold, or one that changes a part of a weight.
    """
    tensors: dict[str, Tensor] = {}
    for key, patch in patches.items():
        if not isinstance(key, str):
            refuse(f"The LoRA patch of {key[0]}", "changes a slice of a weight")
        layer, _, parameter = key.rpartition(".")
        tensors |= {f"{layer}.{slot}": value for slot, value in _slots(key, patch, parameter).items()}
    return tensors


def _slots(key: str, patch: Any, parameter: str) -> dict[str, Tensor]:
    if isinstance(patch, tuple):
        kind, values = patch
        slot = {"weight": {"diff": "diff", "set": "set_weight"}, "bias": {"diff": "diff_b"}}[parameter].get(kind)
        if slot is None or len(values) != 1:
            refuse(f"The patch of {key}", f"is of the kind {kind!r} and needs weights")
        return {slot: values[0]}
    if patch.name not in _SLOTS:
        refuse(f"The {patch.name} adapter of {key}", "is of a kind that needs weights")
    filled = zip(_SLOTS[patch.name], patch.weights, strict=True)
    return {slot: _tensor(value) for slot, value in filled if value is not None}


def _tensor(value: Tensor | float | list[int]) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)
