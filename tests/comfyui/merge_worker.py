"""Run by ComfyUI's interpreter: merges LoRA files into weights by ComfyUI's own code.

python merge_worker.py COMFYUI_DIR FOLDER reads FOLDER/weights.safetensors {layer|dtype: weight} and FOLDER/*.lora (each
a safetensors file that names the layers lora_unet_LAYER), and writes FOLDER/merged.safetensors
{form|layer|dtype|strength|strength_model: weight}.
"""

import json
import sys
from pathlib import Path

comfyui, folder = sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, comfyui)
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.float  # noqa: E402
import comfy.lora  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

weights = load_file(folder / "weights.safetensors")
strengths = json.loads((folder / "strengths.json").read_text())
layers = {f"lora_unet_{key.split('|')[0]}": f"{key.split('|')[0]}.weight" for key in weights}
merged = {}
for lora in sorted(folder.glob("*.lora")):
    patches = comfy.lora.load_lora(load_file(lora), layers)
    for key, weight in weights.items():
        target = f"{key.split('|')[0]}.weight"
        if target not in patches:
            continue
        for strength, strength_model in strengths:
            patch = (strength, patches[target], strength_model, None, None)
            out = comfy.lora.calculate_weight([patch], weight.to(torch.float32, copy=True), target)
            out = comfy.float.stochastic_rounding(out, weight.dtype)
            merged[f"{lora.stem}|{key}|{strength}|{strength_model}"] = out.contiguous()
save_file(merged, folder / "merged.safetensors")
