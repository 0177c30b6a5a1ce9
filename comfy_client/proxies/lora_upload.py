"""LoRA patches as ComfyUI's loaders parsed them, written back as a LoRA file in kohya's names: what a server can read.

Any loader's product travels this way, whichever format its file had and wherever the file lies.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from comfy_client.proxies.refusals import refuse
from protocol.blob import content_hash

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
    """What one loader added to a model; serialised when first needed.

    Args:
        patches: {key of ComfyUI's state dict: weight adapter, or ("diff" | "set", (tensor,))}.
        layer_name: the name a LoRA file has for the layer of a key (given without ".weight" or ".bias").
    """

    def __init__(self, patches: Mapping[str, Any], layer_name: Callable[[str], str]) -> None:
        self._patches = patches
        self._layer_name = layer_name
        self._file: tuple[str, Tensor] | None = None

    def file(self) -> tuple[str, Tensor]:
        """Content hash and bytes (uint8 [N]) of the LoRA as a safetensors file."""
        if self._file is None:
            tensors = lora_file(self._patches, self._layer_name)
            content = torch.frombuffer(bytearray(save(tensors)), dtype=torch.uint8)
            self._file = content_hash(content), content
        return self._file


def lora_file(patches: Mapping[str, Any], layer_name: Callable[[str], str]) -> dict[str, Tensor]:
    """{name in a kohya file: tensor} of ComfyUI's patches.

    Raises:
        NotRemote: a patch of a kind that no LoRA file can hold, or one that changes a part of a weight.
    """
    tensors: dict[str, Tensor] = {}
    for key, patch in patches.items():
        if not isinstance(key, str):
            refuse(f"The LoRA patch of {key[0]}", "changes a slice of a weight")
        layer, _, parameter = key.rpartition(".")
        tensors |= {f"{layer_name(layer)}.{slot}": value for slot, value in _slots(key, patch, parameter).items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
