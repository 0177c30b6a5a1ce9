"""ComfyUI's ModelPatcher for a model without weights: what it would do to weights is written down and sent along."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from comfy import model_management
from comfy.hooks import HookGroup
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from comfy_client.proxies.lora_upload import CapturedLora, add_captured
from comfy_client.proxies.refusals import refuse
from luna_protocol.messages import MAX_LORAS, LoraUse

# Stock patchers keep {weight's key: patches in the order added}. One entry for the whole model keeps the order among
# LoRAs, which decides the result, and lets the stock class copy, compare and scale it as it does its own.
_WHOLE_MODEL = "whole model"


@dataclass(frozen=True)
class ServerLora:
    """A LoRA file that the server has, by its name there."""

    name: str


@dataclass
class LoraStack:
    """What applies to a model's next forward: LoRAs in the order added, then those of the hooks in force.

    Both hold stock patch tuples (strength_patch, CapturedLora | ServerLora, strength_model, ...).
    """

    patches: list[tuple] = field(default_factory=list)
    hooks: list[tuple] = field(default_factory=list)

    def request_fields(self) -> dict[str, list[LoraUse]]:
        """The two stages as a request names them."""
        return {"lora": _uses(self.patches), "hook_lora": _uses(self.hooks)}

    def tensors(self) -> dict[str, Tensor]:
        """What the server may ask for: the captured LoRAs' tensors under the names they travel by."""
        captured = [lora for _, lora, *_ in self.patches + self.hooks if isinstance(lora, CapturedLora)]
        parts = [part for lora in captured for part in lora.parts.items()]
        return {f"lora.{content}.{name}": tensor for content, part in parts for name, tensor in part.items()}


def _uses(patches: list[tuple]) -> list[LoraUse]:
    uses = []
    for strength_patch, lora, strength_model, *_ in patches:
        server = isinstance(lora, ServerLora)
        for which in [{"name": lora.name}] if server else [{"content": content} for content in lora.parts]:
            uses.append(LoraUse(strength_patch=strength_patch, strength_model=strength_model, **which))
    if len(uses) > MAX_LORAS:
        refuse(
            f"A stack of {len(uses)} LoRAs (a loader that gives each layer a strength of its own counts for many)",
            f"has more than {MAX_LORAS} with different strengths for weights",
        )
    return uses


class RemotePatcher(ModelPatcher):
    """A patcher of `model`, which has no parameters and a `lora_stack` that its forwards send.

    It asks for one byte of memory, so ComfyUI never moves another model out for it.
    """

    def __init__(self, model: nn.Module, load_device, offload_device, size: int = 1, **options: Any) -> None:
        super().__init__(model, load_device, offload_device, size=max(1, size), **options)

    @classmethod
    def around(cls, model: nn.Module) -> "RemotePatcher":
        """A patcher whose model takes part in ComfyUI's bookkeeping on its usual device."""
        return cls(model, model_management.get_torch_device(), model_management.unet_offload_device())

    def clone(self, *args: Any, **options: Any):
        clone = super().clone(*args, **options)
        # ComfyUI goes from a clone that is gone to its parent, and reports a leak where that is gone too but the model
        # is not. A failed run's clones go all at once; the first patcher stays as long as the model.
        clone.parent = self.parent or self
        return clone

    def add_server_lora(self, name: str, strength: float) -> None:
        """Add a LoRA file that lies on the server."""
        self.patches.setdefault(_WHOLE_MODEL, []).append((strength, ServerLora(name), 1.0, None, None))
        self._renew()

    # LoRA: written down instead of computed

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        return self._capture(self.patches, patches, strength_patch, strength_model)

    def add_hook_patches(self, hook, patches, strength_patch=1.0, strength_model=1.0):
        return self._capture(self.hook_patches.setdefault(hook.hook_ref, {}), patches, strength_patch, strength_model)

    def load(self, *args, **kwargs):
        self.model.lora_stack.patches = self.patches.get(_WHOLE_MODEL, [])
        super().load(*args, **kwargs)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            self.model.lora_stack.patches = []
        super().unpatch_model(device_to, unpatch_weights)

    def patch_hooks(self, hooks: HookGroup | None) -> None:
        self.model.lora_stack.hooks = self.get_combined_hook_patches(hooks).get(_WHOLE_MODEL, [])
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set=None) -> None:
        self.model.lora_stack.hooks = []
        self.current_hooks = None

    def _capture(self, into: dict, patches: dict, strength_patch: float, strength_model: float) -> list:
        known = self.model_state_dict()
        ours = {key: patch for key, patch in patches.items() if (key if isinstance(key, str) else key[0]) in known}
        if ours:
            add_captured(into.setdefault(_WHOLE_MODEL, []), CapturedLora(ours), strength_patch, strength_model)
            self._renew()
        return list(ours)

    def _renew(self) -> None:
        # A new identity, as ComfyUI gives it, so that a loaded clone is known to differ.
        self.patches_uuid = uuid.uuid4()

    # What needs the weights

    def get_key_patches(self, filter_prefix=None):
        refuse("A ModelMerge or CLIPMerge node", "reads the weights")

    def set_model_compute_dtype(self, dtype):
        refuse("ModelComputeDtype", "sets what the weights are computed in")

    def add_weight_wrapper(self, name, function):
        refuse("A weight wrapper", f"changes the weight {name} at each use")

    def set_injections(self, key, injections):
        refuse(f"The injection {key!r} (a bypass LoRA loader, for instance)", "replaces the model's layers")

    def add_object_patch(self, name, obj):
        if name.startswith("diffusion_model"):
            refuse(f"A patch of {name} (TorchCompileModel, for instance)", "replaces the model's layers")
        super().add_object_patch(name, obj)
