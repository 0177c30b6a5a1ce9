"""A ComfyUI node for benchmarks/comfyui_memory.py: the bytes of weights that this ComfyUI's process holds."""

import gc

from torch import nn


class WeightsHeld:
    RETURN_TYPES = ()
    FUNCTION = "count"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("IMAGE",)}}

    def count(self, after):
        tensors = {}
        for module in (thing for thing in gc.get_objects() if isinstance(thing, nn.Module)):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if not tensor.is_meta:
                    tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return {"ui": {"text": [sum(tensors.values())]}}


NODE_CLASS_MAPPINGS = {"WeightsHeld": WeightsHeld}
