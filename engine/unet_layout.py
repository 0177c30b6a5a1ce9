"""What a UNet in the original (LDM) single-file layout looks like, read from its tensors' shapes.

Numbers the file's blocks one by one (input_blocks.N, middle_block.N, output_blocks.N), as ComfyUI and every LoRA and
ControlNet count them; diffusers groups the same blocks by level. This module knows both names of each.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from luna_protocol.errors import Malformed

Shapes = Mapping[str, tuple[int, ...]]

_RESNET_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "class_embedding.linear_1",
    "label_emb.0.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class UNetLayout:
    """A UNet's structure.

    channels: width per resolution level. input_depths / output_depths: per level (output: lowest resolution first), the
    number of transformer blocks behind each residual block, 0 for none. middle_depth: the same for the middle block,
    -1 for a lone residual block, -2 for no middle block at all. adm_channels: width of `y`, None without it.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    input_depths: tuple[tuple[int, ...], ...]
    middle_depth: int
    output_depths: tuple[tuple[int, ...], ...]
    context_dim: int
    use_linear: bool
    adm_channels: int | None

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "UNetLayout":
        """Reads the structure from {LDM key: shape}.

        Raises:
            Malformed: when a tensor that decides the structure is missing.
        """
        channels, input_depths = _input_levels(shapes)
        proj_in = next((shape for key, shape in shapes.items() if key.endswith("proj_in.weight")), None)
        to_k = next((shape for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
        if proj_in is None or to_k is None:
            raise Malformed("the UNet has no cross-attention", "SD1.5 and SDXL UNets have it")
        return cls(
            in_channels=_shape(shapes, "input_blocks.0.0.weight")[1],
            out_channels=_shape(shapes, "out.2.weight")[0],
            channels=channels,
            input_depths=input_depths,
            middle_depth=_middle_depth(shapes),
            output_depths=_output_levels(shapes),
            context_dim=to_k[1],
            use_linear=len(proj_in) == 2,
            adm_channels=shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else None,
        )

    def blocks(self) -> dict[str, str]:
        """{LDM prefix: diffusers prefix} of every residual block, transformer, down- and upsampler."""
        names: dict[str, str] = {}
        index = 1
        for level, depths in enumerate(self.input_depths):
            for layer, depth in enumerate(depths):
                names[f"input_blocks.{index}.0"] = f"down_blocks.{level}.resnets.{layer}"
                if depth:
                    names[f"input_blocks.{index}.1"] = f"down_blocks.{level}.attentions.{layer}"
                index += 1
            if level < len(self.channels) - 1:
                names[f"input_blocks.{index}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
                index += 1
        if self.middle_depth >= -1:
            names["middle_block.0"] = "mid_block.resnets.0"
        if self.middle_depth >= 0:
            names["middle_block.1"] = "mid_block.attentions.0"
            names["middle_block.2"] = "mid_block.resnets.1"
        index = 0
        for level, depths in enumerate(self.output_depths):
            for layer, depth in enumerate(depths):
                names[f"output_blocks.{index}.0"] = f"up_blocks.{level}.resnets.{layer}"
                if depth:
                    names[f"output_blocks.{index}.1"] = f"up_blocks.{level}.attentions.{layer}"
                index += 1
            if level < len(self.channels) - 1:
                place = 2 if depths[-1] else 1
                names[f"output_blocks.{index - 1}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
        return names

    def diffusers_names(self, keys: Iterable[str]) -> dict[str, str]:
        """{LDM key: diffusers key} for those of `keys` that belong to a block of this layout."""
        blocks = {**self.blocks(), **_ENDS}
        names = {key: _rename(key, blocks) for key in keys}
        return {key: name for key, name in names.items() if name}

    def original_names(self, parameters: Mapping[str, object]) -> dict[str, str]:
        """{diffusers key: LDM key} for those of `parameters` that belong to a block of this layout: the way back."""
        blocks = {theirs: original for original, theirs in {**self.blocks(), **_ENDS}.items()}
        resnet = {theirs: original for original, theirs in _RESNET_NAMES.items()}
        names = {}
        for name in parameters:
            prefix = max((block for block in blocks if name.startswith(f"{block}.")), key=len, default=None)
            if prefix is None:
                continue
            module, _, parameter = name[len(prefix) + 1 :].rpartition(".")
            names[name] = ".".join(filter(None, (blocks[prefix], resnet.get(module, module), parameter)))
        return names

    def diffusers_config(self) -> dict:
        """Arguments for diffusers' `UNet2DConditionModel`.

        Heads follow the family's rule, which no shape tells: 8 of them with a convolutional projection (SD1.x), else 64
        channels each (diffusers calls the *number* of heads `attention_head_dim`).
        """
        attended = [any(depths) for depths in self.input_depths]
        depths = [list(level) if any(level) else 1 for level in self.input_depths]
        if not attended[-1]:
            # diffusers takes the middle block's depth from the last level, which does not use it without attention.
            depths[-1] = max(self.middle_depth, 1)
        elif self.middle_depth >= 0 and set(self.input_depths[-1]) == {self.middle_depth}:
            depths[-1] = self.middle_depth
        elif self.middle_depth >= 0:
            raise Malformed(
                f"the middle block has depth {self.middle_depth}, the level before it {self.input_depths[-1]}",
                "UNets whose middle block is as deep as the last level can be served",
            )
        middle = {-2: None, -1: "UNetMidBlock2D"}.get(self.middle_depth, "UNetMidBlock2DCrossAttn")
        adm = (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": self.adm_channels}
            if self.adm_channels
            else {}
        )
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.channels,
            "layers_per_block": [len(level) for level in self.input_depths],
            "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
            "mid_block_type": middle,
            "up_block_types": ["CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in self.output_depths],
            "transformer_layers_per_block": depths,
            "reverse_transformer_layers_per_block": [list(d) if any(d) else 1 for d in self.output_depths],
            "cross_attention_dim": self.context_dim,
            "attention_head_dim": [c // 64 for c in self.channels] if self.use_linear else 8,
            "use_linear_projection": self.use_linear,
            **adm,
        }


def names_from_diffusers(shapes: Shapes) -> dict[str, str]:
    """{diffusers key: LDM key} of a UNet file in diffusers' layout, given {diffusers key: shape}."""
    down, up = (
        [
            tuple(
                _depth(shapes, f"{side}.{level}.attentions.{layer}")
                for layer in range(_count(shapes, f"{side}.{level}.resnets"))
            )
            for level in range(_count(shapes, side))
        ]
        for side in ("down_blocks", "up_blocks")
    )
    middle = _depth(shapes, "mid_block.attentions.0") or -1 - ("mid_block.resnets.0.conv1.weight" not in shapes)
    layout = UNetLayout(0, 0, (0,) * len(down), tuple(down), middle, tuple(up), 0, False, None)
    # SDXL's vector conditioning has a name of its own there.
    own = {key.replace("add_embedding.", "class_embedding."): key for key in shapes}
    return {own[name]: original for name, original in layout.original_names(own).items()}


def _count(shapes: Shapes, prefix: str) -> int:
    return len({key[len(prefix) + 1 :].split(".")[0] for key in shapes if key.startswith(f"{prefix}.")})


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise Malformed(f"the UNet lacks the tensor {key}", "is the file complete, and in the original (LDM) layout?")
    return shapes[key]


def _depth(shapes: Shapes, prefix: str) -> int:
    depth = 0
    while f"{prefix}.transformer_blocks.{depth}.norm1.weight" in shapes:
        depth += 1
    return depth


def _input_levels(shapes: Shapes) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    channels: list[int] = []
    depths: list[list[int]] = [[]]
    index = 1
    while True:
        if f"input_blocks.{index}.0.out_layers.3.weight" in shapes:
            if not depths[-1]:
                channels.append(shapes[f"input_blocks.{index}.0.out_layers.3.weight"][0])
            depths[-1].append(_depth(shapes, f"input_blocks.{index}.1"))
        elif f"input_blocks.{index}.0.op.weight" in shapes:
            depths.append([])
        else:
            break
        index += 1
    if not all(depths):
        raise Malformed(
            f"the UNet's input blocks end at {index - 1}, in the middle of a level", "is the file complete?"
        )
    return tuple(channels), tuple(map(tuple, depths))


def _output_levels(shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    depths: list[list[int]] = [[]]
    index = 0
    while f"output_blocks.{index}.0.out_layers.3.weight" in shapes:
        depth = _depth(shapes, f"output_blocks.{index}.1")
        depths[-1].append(depth)
        if f"output_blocks.{index}.{2 if depth else 1}.conv.weight" in shapes:
            depths.append([])
        index += 1
    if not all(depths):
        raise Malformed(
            f"the UNet's output blocks end at {index - 1}, in the middle of a level", "is the file complete?"
        )
    return tuple(map(tuple, depths))


def _middle_depth(shapes: Shapes) -> int:
    if "middle_block.0.out_layers.3.weight" not in shapes:
        return -2
    return _depth(shapes, "middle_block.1") or -1


def _rename(key: str, blocks: Mapping[str, str]) -> str | None:
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in blocks:
            break
    else:
        return None
    rest = ".".join(parts[length:])
    if ".resnets." in blocks[prefix]:
        module, _, parameter = rest.rpartition(".")
        if module not in _RESNET_NAMES:
            return None
        rest = f"{_RESNET_NAMES[module]}.{parameter}"
    return f"{blocks[prefix]}.{rest}"
