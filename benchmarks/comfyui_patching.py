"""Run by ComfyUI's interpreter: seconds that its ModelPatcher takes to patch a checkpoint's UNet with a LoRA file.

python comfyui_patching.py COMFYUI_DIR CHECKPOINT LORA DTYPE prints a JSON list of five measurements.
"""

import json
import sys
import time

comfyui, checkpoint, lora, dtype = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.lora  # noqa: E402
import comfy.model_patcher  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

PREFIX = "model.diffusion_model."


def module_of(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Modules nested by the weights' names, as ComfyUI's patcher walks them."""
    root = torch.nn.Module()
    for name, weight in weights.items():
        *path, leaf = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(leaf, torch.nn.Parameter(weight, requires_grad=False))
    return root


def main() -> None:
    torch.set_num_threads(1)
    kept = {
        f"diffusion_model.{key.removeprefix(PREFIX)}": tensor.to(getattr(torch, dtype))
        for key, tensor in load_file(checkpoint).items()
        if key.startswith(PREFIX)
    }
    names = {
        "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_"): key
        for key in kept
        if key.endswith(".weight")
    }
    patches = comfy.lora.load_lora(load_file(lora), names)
    device = torch.device("cpu")
    model = module_of(kept)
    seconds = []
    for _ in range(5):
        patcher = comfy.model_patcher.ModelPatcher(model, device, device)
        assert len(patcher.add_patches(patches, 0.8)) == len(patches)
        begun = time.perf_counter()
        with torch.inference_mode():
            for key in patcher.patches:
                patcher.patch_weight_to_device(key)
        seconds.append(time.perf_counter() - begun)
        patcher.unpatch_model()
    print(json.dumps(seconds))


main()
