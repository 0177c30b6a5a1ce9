"""Custom nodes that patch a MODEL in ways of third-party packs; ComfyUI loads this file."""

import comfy.lora
import comfy.utils
import folder_paths
import torch


class _Patch:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"


class LoraByBlock(_Patch):
    """As block-weight loaders do: each layer is added by itself, with its block's strength, or each with another."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "lora_name": ("STRING", {}), "all_different": ("BOOLEAN", {})}}

    def patch(self, model, lora_name, all_different):
        model = model.clone()
        tensors = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", lora_name))
        patches = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(model.model, {}))
        for index, key in enumerate(sorted(patches)):
            block = sum(key.split(".")[1].encode()) + sum(int(part) for part in key.split(".")[2:3] if part.isdigit())
            model.add_patches({key: patches[key]}, 0.1 + (index / 997 if all_different else block % 12 / 10))
        return (model,)


class EveryForm(_Patch):
    """Whole tensors in the forms that `add_patches` takes, for weights and biases, over one another."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model):
        model = model.clone()
        draw = torch.Generator().manual_seed(3)
        shapes = {key: each.shape for key, each in model.model_state_dict("diffusion_model.output_blocks").items()}
        for index, (key, shape) in enumerate(sorted(shapes.items())):
            change = torch.randn(shape, generator=draw) * 0.01
            if index % 4 == 0:
                model.add_patches({key: ("diff", (change,))}, 0.7)
            elif index % 4 == 1:
                model.add_patches({key: (change,)}, -0.4, 0.9)
            elif index % 4 == 2:
                model.add_patches({key: ("set", (change,))})
            model.add_patches({key: (None,)}, 0.0, 1.0 + index % 3 / 10)
        return (model,)


class MergeOfAnother(_Patch):
    """Weights of another model as a patch, as ModelMergeSimple adds them to its first model."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "other": ("MODEL",)}}

    def patch(self, model, other):
        model = model.clone()
        for key, patch in other.get_key_patches("diffusion_model.middle_block").items():
            model.add_patches({key: patch}, 0.5, 0.5)
        return (model,)


class ManyConds:
    """A conditioning of many masked parts."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "count": ("INT", {"max": 1000})}}

    def make(self, conditioning, count):
        [(cond, settings)] = conditioning
        masks = (torch.arange(8 * 8).view(1, 8, 8) % count == index for index in range(count))
        return ([[cond * (1 + index / count), settings | {"mask": mask.float()}] for index, mask in enumerate(masks)],)


NODE_CLASS_MAPPINGS = {
    "TestLoraByBlock": LoraByBlock,
    "TestEveryForm": EveryForm,
    "TestMergeOfAnother": MergeOfAnother,
    "TestManyConds": ManyConds,
}
