"""Serves text encoders: `ClipEncode` (token ids) or `ClipText` (plain text) in, `ClipOutput` out."""

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from engine import tokenizer
from engine.checkpoints import detect, read_header
from engine.lora.names import text_targets
from engine.role import Item, Reply
from engine.roles.patched import PatchedRole, refuse_unknown
from engine.text_encoder import TextEncoder
from engine.weights import Weights
from luna_protocol.errors import Impossible, NotFound, TooLarge
from luna_protocol.messages import ClipEncode, ClipOutput, ClipText

MAX_ROWS = 256
_PAD = {"clip_l": tokenizer.END, "clip_g": 0}


class ClipRole(PatchedRole):
    accepts = (ClipEncode, ClipText)

    def load(self) -> None:
        self.encoders = self._read()
        models = _models(self.encoders)
        names = {name: [own for own, _ in model.named_parameters()] for name, model in models.items()}
        self.weights = Weights(models, lambda: _models(self._read()))
        self.take_loras(models, text_targets(names))

    def _read(self) -> dict[str, TextEncoder]:
        path = self.settings.checkpoint_path()
        part = detect(read_header(path)).parts["clip"]
        return {
            name: TextEncoder.load(path, part, name, self.dtype, self.device)
            for name in sorted(part.names, reverse=True)
        }

    def warm_up(self) -> None:
        for encoder in self.encoders.values():
            encoder.encode(torch.zeros(1, 77, dtype=torch.long, device=self.device), None, None, True, True)

    def check(self, item: Item) -> None:
        if isinstance(item.request, ClipText):
            refuse_unknown(item, ())
            if (count := tokenizer.count_sections(item.request.texts)) > MAX_ROWS:
                raise TooLarge(
                    f"the texts make {count} sections of 77 tokens, each text as many as the longest",
                    f"at most {MAX_ROWS} go in a request: send fewer texts, or shorter ones",
                )
            return
        refuse_unknown(item, ("tokens", "embeddings", "embedding_positions"))
        self._encoder(item.request.encoder)
        tokens = item.take("tokens", 2, floating=False)
        if not 1 <= len(tokens) <= MAX_ROWS:
            raise Impossible(f"tokens have {len(tokens)} rows", f"send 1 to {MAX_ROWS}")
        self._encoder(item.request.encoder).check(tokens, _vectors(item), _layer(item.request))

    def group_key(self, item: Item) -> Hashable:
        if isinstance(item.request, ClipText):
            return id(item)
        return (item.request.model_dump_json(exclude={"references"}), item.tensors["tokens"].shape[1])

    def run_patched(self, items: list[Item]) -> list[Reply]:
        first = items[0].request
        if isinstance(first, ClipText):
            return [self._text(first)]
        rows = [len(item.tensors["tokens"]) for item in items]
        tokens = torch.cat([item.tensors["tokens"].long() for item in items])
        hidden, pooled = self._encoder(first.encoder).encode(
            tokens.to(self.device), self._joined_vectors(items, rows), _layer(first), first.final_norm, first.projected
        )
        parts = zip(hidden.cpu().split(rows), pooled.cpu().split(rows), strict=True)
        return [Reply(ClipOutput(), {"hidden": h, "pooled": p}) for h, p in parts]

    def _encoder(self, name: str) -> TextEncoder:
        if name not in self.encoders:
            raise NotFound(f"this model has no encoder {name!r}", f"it has {', '.join(self.encoders)}")
        return self.encoders[name]

    def _joined_vectors(self, items: list[Item], rows: list[int]) -> tuple[Tensor, Tensor] | None:
        embeddings, places, base = [], [], 0
        for item, count in zip(items, rows, strict=True):
            if (vectors := _vectors(item)) is not None:
                embeddings.append(vectors[0].to(self.device, self.dtype))
                places.append(vectors[1].long().to(self.device) + torch.tensor([base, 0], device=self.device))
            base += count
        return (torch.cat(embeddings), torch.cat(places)) if embeddings else None

    def _text(self, request: ClipText) -> Reply:
        """What ComfyUI's CLIPTextEncode gives: sections one after the other, encoders side by side, pooled of the last
        encoder's first section. SDXL takes the penultimate layers without the final norm."""
        several = self.settings.family == "sdxl"
        layer = request.clip_skip if request.clip_skip is not None else (-2 if several else None)
        hidden, pooled = [], None
        for name, encoder in self.encoders.items():
            ids = tokenizer.sections(request.texts, _PAD[name]).to(self.device)
            states, ends = encoder.encode(ids.flatten(0, 1), None, layer, final_norm=not several, projected=several)
            hidden.append(states.unflatten(0, ids.shape[:2]).flatten(1, 2))
            pooled = ends.unflatten(0, ids.shape[:2])[:, 0]
        return Reply(ClipOutput(), {"hidden": torch.cat(hidden, dim=-1).cpu(), "pooled": pooled.cpu()})


def _models(encoders: dict[str, TextEncoder]) -> nn.ModuleDict:
    return nn.ModuleDict({name: encoder.model for name, encoder in encoders.items()})


def _vectors(item: Item) -> tuple[Tensor, Tensor] | None:
    if "embeddings" not in item.tensors and "embedding_positions" not in item.tensors:
        return None
    return item.take("embeddings", 2), item.take("embedding_positions", 2, floating=False)


def _layer(request: ClipEncode) -> int | None:
    if request.layer == "last":
        return None
    if request.layer_index is None:
        raise Impossible("layer 'hidden' without a layer_index", "name the layer, for instance -2")
    return request.layer_index
