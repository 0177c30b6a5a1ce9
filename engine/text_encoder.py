"""CLIP text encoders: transformers' modules, frozen, with ComfyUI's choice of layer, norm and pooled output."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from engine.checkpoints import Part
from engine.weights import adopt, read_tensors
from luna_protocol.alignment import aligned
from luna_protocol.errors import Impossible, Malformed

END_TOKEN = 49407
_G_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_G_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


class TextEncoder:
    """One frozen CLIP text encoder.

    Attributes:
        model: transformers' module, never written. Its `text_projection`, where the file has one, is ours: the linear
            layer [P, D] of the projected pooled output, which is the identity where there is none.
    """

    def __init__(self, model: CLIPTextModel):
        self.model = model

    @classmethod
    def load(cls, path: Path, part: Part, encoder: str, dtype: torch.dtype, device: torch.device) -> "TextEncoder":
        """Reads encoder "clip_l" or "clip_g" of a checkpoint straight to `device` as `dtype`.

        Raises:
            Malformed: the file's tensors do not make a CLIP text encoder.
        """
        return cls.build(read_tensors(path, part, encoder, dtype, device), encoder)

    @classmethod
    def build(cls, tensors: dict[str, Tensor], encoder: str) -> "TextEncoder":
        """Encoder "clip_l" or "clip_g" of {name as by transformers or OpenCLIP: tensor}; raises as `load`."""
        open_clip = "token_embedding.weight" in tensors
        with torch.device("meta"):
            model = CLIPTextModel(_config({key: t.shape for key, t in tensors.items()}, encoder, open_clip))
        projection = _projection(tensors)
        tensors = _from_open_clip(tensors) if open_clip else _from_transformers(tensors)
        adopt(model, tensors, encoder)
        device = model.final_layer_norm.weight.device
        # Not in the file and so still on the meta device: it only counts positions.
        model.embeddings.position_ids = torch.arange(model.config.max_position_embeddings, device=device)[None]
        if projection is not None:
            model.text_projection = torch.nn.Linear(*projection.shape[::-1], bias=False, device="meta")
            adopt(model.text_projection, {"weight": projection}, f"{encoder}'s projection")
        return cls(model)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    def encode(
        self,
        tokens: Tensor,
        vectors: tuple[Tensor, Tensor] | None = None,
        layer: int | None = None,
        final_norm: bool = True,
        projected: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [N, T, D] and pooled output [N, P], both float32.

        Args:
            tokens: [N, T] token ids, T up to 77.
            vectors: (embeddings [M, D], positions [M, 2] row and column) that replace tokens' own embeddings.
            layer: None for the output after the final norm, else a layer's index (-2 the penultimate).
            final_norm: whether a layer's output passes the final norm too.
            projected: whether the pooled output passes the text projection.

        What `check` refuses must not come here.
        """
        # The first end token is where CLIP pools; vectors stand in columns whose token id does not count.
        ids = tokens if vectors is None else tokens.index_put(tuple(vectors[1].T), tokens.new_tensor(0))
        ended = ids == END_TOKEN
        last = torch.where(ended.any(1), ended.int().argmax(1), tokens.shape[1] - 1)
        hook = (
            None if vectors is None else self.model.embeddings.token_embedding.register_forward_hook(_placing(vectors))
        )
        try:
            output = self.model(ids, output_hidden_states=layer is not None)
        finally:
            if hook:
                hook.remove()
        hidden = output.last_hidden_state
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        if projected and hasattr(self.model, "text_projection"):
            pooled = self.model.text_projection(pooled)
        if layer is not None:
            index = layer if layer >= 0 else self.layers + layer
            hidden = output.hidden_states[index + 1]
            if final_norm:
                hidden = self.model.final_layer_norm(hidden)
        return hidden.float(), pooled.float()

    def check(self, tokens: Tensor, vectors: tuple[Tensor, Tensor] | None, layer: int | None) -> None:
        """Whether `encode` can take these.

        Raises:
            Impossible: ids, positions, widths or a layer that this encoder does not have.
        """
        positions, vocabulary = self.model.config.max_position_embeddings, self.model.config.vocab_size
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= positions:
            raise Impossible(f"tokens have shape {list(tokens.shape)}", f"send [N, T] with T from 1 to {positions}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise Impossible(
                f"token ids reach from {int(tokens.min())} to {int(tokens.max())}", f"send 0 to {vocabulary - 1}"
            )
        if layer is not None and not -self.layers <= layer < self.layers:
            raise Impossible(
                f"layer {layer} of an encoder with {self.layers}", f"send {-self.layers} to {self.layers - 1}"
            )
        if vectors is None:
            return
        embeddings, places = vectors
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise Impossible(f"embeddings have shape {list(embeddings.shape)}", f"this encoder takes [M, {self.width}]")
        if places.shape != (len(embeddings), 2):
            raise Impossible(f"embedding_positions have shape {list(places.shape)}", f"send [{len(embeddings)}, 2]")
        limit = places.new_tensor(tokens.shape)
        if bool((places < 0).any() | (places >= limit).any()):
            raise Impossible(
                "an embedding's position lies outside the tokens", f"rows and columns below {list(tokens.shape)}"
            )


def _placing(vectors: tuple[Tensor, Tensor]):
    def place(_module, _inputs, output: Tensor) -> Tensor:
        return output.index_put(tuple(vectors[1].T), vectors[0].to(output))

    return place


def _config(shapes: dict[str, tuple[int, ...]], encoder: str, open_clip: bool) -> CLIPTextConfig:
    root = "" if open_clip else "text_model."
    layer = root + ("transformer.resblocks" if open_clip else "encoder.layers")
    first = f"{layer}.0." + ("mlp.c_fc.weight" if open_clip else "mlp.fc1.weight")
    table = "token_embedding.weight" if open_clip else root + "embeddings.token_embedding.weight"
    positions = "positional_embedding" if open_clip else root + "embeddings.position_embedding.weight"
    for key in (table, positions, first):
        if key not in shapes:
            raise Malformed(f"the {encoder} lacks the tensor {key}", "is the file complete?")
    depth = 1 + max(int(key[len(layer) + 1 :].split(".")[0]) for key in shapes if key.startswith(layer + "."))
    return CLIPTextConfig(
        vocab_size=shapes[table][0],
        hidden_size=shapes[table][1],
        intermediate_size=shapes[first][0],
        num_hidden_layers=depth,
        num_attention_heads=shapes[table][1] // 64,
        max_position_embeddings=shapes[positions][0],
        hidden_act="quick_gelu" if encoder == "clip_l" else "gelu",
        eos_token_id=END_TOKEN,
    )


def _projection(tensors: dict[str, Tensor]) -> Tensor | None:
    """Taken out of `tensors`: [P, D], or without ".weight", as OpenCLIP keeps it, transposed."""
    transposed = tensors.pop("text_projection", None)
    return tensors.pop("text_projection.weight", None) if transposed is None else transposed.T.contiguous()


def _from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def _from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP keeps q, k and v in one tensor."""
    renamed = {}
    for key, tensor in tensors.items():
        name = _G_ENDS.get(key, key).replace("transformer.resblocks.", "encoder.layers.")
        if ".attn.in_proj_" in name:
            prefix, kind = name.split(".attn.in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{prefix}.self_attn.{letter}_proj.{kind}"] = aligned(third)
            continue
        for theirs, ours in _G_NAMES.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        renamed[name] = tensor
    return renamed
