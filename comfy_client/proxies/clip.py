"""CLIP: ComfyUI's own tokenizer, weights syntax and sections around text encoders that run on the server."""

from typing import Any

import folder_paths
import torch
from comfy import supported_models
from comfy.hooks import EnumHookMode
from comfy.sd import CLIP
from comfy.sd1_clip import SD1ClipModel, SDClipModel
from comfy.sdxl_clip import SDXLClipModel
from comfy.utils import clip_text_transformers_convert
from torch import Tensor, nn

from comfy_client.proxies.patcher import LoraStack, RemotePatcher
from comfy_client.proxies.refusals import refuse
from comfy_client.proxies.remote import Remote
from luna_protocol.messages import ClipEncode

_FAMILIES = {"sd15": supported_models.SD15, "sdxl": supported_models.SDXL}
_END, _PAD = 49407, {"clip_l": 49407, "clip_g": 0}


def remote_clip(remote: Remote) -> "RemoteCLIP":
    """A CLIP for served text encoders: prompts are tokenised and weighted here, encoded there."""
    clip = RemoteCLIP(no_init=True)
    config = _FAMILIES[remote.model.family]({})
    clip.cond_stage_model = _cond_stage_model(remote)
    clip.tokenizer = config.clip_target().tokenizer(embedding_directory=folder_paths.get_folder_paths("embeddings"))
    clip.patcher = RemotePatcher.around(clip.cond_stage_model)
    clip.patcher.hook_mode = EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.layer_idx = None
    clip.use_clip_schedule = False
    clip.apply_hooks_to_conds = None
    clip.tokenizer_options = {}
    return clip


class RemoteCLIP(CLIP):
    """ComfyUI's CLIP; only what reads the weights is refused."""

    def get_sd(self):
        refuse("CLIPSave or CheckpointSave", "reads the weights")

    def clone(self, *args: Any, **options: Any) -> "RemoteCLIP":
        clone = super().clone(*args, **options)
        clone.__class__ = RemoteCLIP
        return clone


class RemoteTextEncoder(SDClipModel):
    """One text encoder without parameters; options and weights syntax are the stock class's."""

    def __init__(self, remote: Remote, encoder: str, lora_stack: LoraStack, sdxl: bool) -> None:
        nn.Module.__init__(self)
        self.remote = remote
        self.encoder = encoder
        self.lora_stack = lora_stack
        self.num_layers = _layers(remote.description.shapes[encoder])
        self.special_tokens = {"start": 49406, "end": _END, "pad": _PAD[encoder]}
        self.layer, self.layer_idx = ("hidden", -2) if sdxl else ("last", None)
        self.layer_norm_hidden_state = not sdxl
        self.return_projected_pooled = True
        self.execution_device = None
        self.options_default = (self.layer, self.layer_idx, self.return_projected_pooled)

    def forward(self, tokens: list[list[int | Tensor | dict]]) -> tuple[Tensor, Tensor]:
        """Hidden states [N, T, D] and pooled output [N, P] of N rows of token ids, some of them vectors instead."""
        width = _width(self.remote.description.shapes[self.encoder])
        ids, vectors, places = [], [], []
        for row, entries in enumerate(tokens):
            kept = [entry for entry in entries if isinstance(entry, int) or _vector(entry).shape[-1] == width]
            # As ComfyUI does with an embedding made for another encoder: leave it out, and pad.
            kept += [self.special_tokens["pad"]] * (len(entries) - len(kept))
            ids.append([entry if isinstance(entry, int) else 0 for entry in kept])
            for column, entry in enumerate(kept):
                if not isinstance(entry, int):
                    vectors.append(_vector(entry).reshape(width))
                    places.append([row, column])
        tensors = {"tokens": torch.tensor(ids)}
        if vectors:
            tensors |= {"embeddings": torch.stack(vectors), "embedding_positions": torch.tensor(places)}
        request = ClipEncode(
            encoder=self.encoder,
            layer=self.layer,
            layer_index=self.layer_idx if self.layer == "hidden" else None,
            final_norm=self.layer_norm_hidden_state,
            projected=self.return_projected_pooled,
            **self.lora_stack.request_fields(),
        )
        _, reply = self.remote.ask(request, tensors | self.lora_stack.tensors())
        return reply["hidden"], reply["pooled"]


def _cond_stage_model(remote: Remote) -> nn.Module:
    """ComfyUI's model of one or two encoders, its encoders replaced, without ever allocating the stock ones."""
    sdxl, encoders = remote.model.family == "sdxl", list(remote.description.shapes)
    stack = LoraStack()
    base = SDXLClipModel if len(encoders) > 1 else SD1ClipModel
    model = type("Remote" + base.__name__, (_ShapesOnly, base), {})()
    model.shapes = {key: tensor for encoder in encoders for key, tensor in _keys(remote, encoder).items()}
    model.dtypes = {remote.dtype}
    model.lora_stack = stack
    if len(encoders) == 1:  # SD1.5's, or SDXL's refiner's
        model.clip_name, model.clip = encoders[0].removeprefix("clip_"), encoders[0]
    for encoder in encoders:
        setattr(model, encoder, RemoteTextEncoder(remote, encoder, stack, sdxl))
    return model


def _keys(remote: Remote, encoder: str) -> dict[str, Tensor]:
    """The encoder's tensors by ComfyUI's own names, whichever layout its file has."""
    tensors = remote.meta_tensors(encoder)
    inner = "transformer." if any(key.startswith("text_model.") for key in tensors) else ""
    named = {f"{encoder}.{inner}{key}": tensor for key, tensor in tensors.items()}
    return clip_text_transformers_convert(named, f"{encoder}.", f"{encoder}.transformer.")


class _ShapesOnly(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """The remote keys on the meta device, so that LoRA loaders find what they patch."""
        return dict(self.shapes)


def _vector(entry: Tensor | dict) -> Tensor:
    return entry["data"] if isinstance(entry, dict) else entry


def _layers(shapes: dict[str, list[int]]) -> int:
    layers = {key.split("layers.")[-1].split("resblocks.")[-1].split(".")[0] for key in shapes if ".mlp." in key}
    return len(layers)


def _width(shapes: dict[str, list[int]]) -> int:
    return next(shape[1] for key, shape in shapes.items() if key.endswith("token_embedding.weight"))
