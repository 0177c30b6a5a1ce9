"""Run by ComfyUI's interpreter: what our proxies make of served models that are described to them.

python detection_worker.py COMFYUI_DIR REPOSITORY FOLDER reads FOLDER/*.json (each a ModelDescription) and writes
FOLDER/seen.jsonl, a line each. COMFYUI_DIR's folder of models is not touched.
"""

import json
import sys
from pathlib import Path

comfyui, repository, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sys.path[:0] = [comfyui, repository]
sys.argv[1:] = ["--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import utils.extra_config  # noqa: E402, F401  as main.py does, before comfy's own utils can take the name

from comfy_client.proxies.clip import remote_clip  # noqa: E402
from comfy_client.proxies.model import remote_model  # noqa: E402
from comfy_client.proxies.remote import Remote  # noqa: E402
from luna_protocol.messages import ModelDescription  # noqa: E402


def seen(remote: Remote) -> dict:
    if remote.model.role == "unet":
        model = remote_model(remote).model
        sampling = model.model_sampling
        return {
            "base": type(model).__name__,
            "type": model.model_type.name,
            "latent": type(model.latent_format).__name__,
            "sigmas": [float(sampling.sigma_min), float(sampling.sigma_max)],
        }
    clip = remote_clip(remote)
    tokens = clip.tokenize("a fox")
    stage = clip.cond_stage_model
    return {
        "base": type(stage).__name__,
        "encoder": getattr(stage, "clip", None),
        "tokens": sorted(tokens),
        "keys": sorted(stage.state_dict()),
    }


with (folder / "seen.jsonl").open("w") as file:
    for path in sorted(folder.glob("*.json")):
        description = ModelDescription.model_validate_json(path.read_text())
        print(json.dumps({"name": path.stem} | seen(Remote(description, None))), file=file)
