"""What LoRA files call the weights of our models: one table of {name in a file: our parameter}, built per model.

Names differ by trainer: kohya writes `lora_unet_` and `lora_te_` with underscores, over the block names of the original
files or of diffusers; LyCORIS `lycoris_`; diffusers and peft dotted module paths, older ones through `processor`; and
ComfyUI's own keys serve as they are.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_UNET_NAMES = ("lora_unet_", "lycoris_", "diffusion_model.", "unet.", "down_blocks.", "mid_block.", "up_blocks.")
_TEXT_NAMES = ("lora_te", "text_encoder", "clip_l.", "clip_g.")


@dataclass(frozen=True)
class Targets:
    """The weights of one model that a LoRA can patch.

    parameters: {a module's or weight's name in a file: our parameter}. A weight's module stands for the weight.
    elsewhere: starts of names that belong to the checkpoint's other parts.
    """

    parameters: dict[str, str]
    elsewhere: tuple[str, ...]


def unet_targets(names: Mapping[str, str]) -> Targets:
    """Targets of a UNet from its `names`, {original key: diffusers parameter}."""
    table: dict[str, str] = {}
    for original, parameter in names.items():
        table[f"diffusion_model.{original.removesuffix('.weight')}"] = parameter
        if not original.endswith(".weight"):
            continue
        ours, theirs = parameter.removesuffix(".weight"), original.removesuffix(".weight")
        underscored = ours.replace(".", "_")
        table[f"lora_unet_{theirs.replace('.', '_')}"] = parameter
        table[f"lora_unet_{underscored}"] = parameter
        table[f"lycoris_{underscored}"] = parameter
        processor = ours.replace(".to_", ".processor.to_").removesuffix(".0")
        for name in (ours, processor):
            table |= {f"{prefix}{name}": parameter for prefix in ("", "unet.", "base_model.model.")}
    return Targets(table, _TEXT_NAMES)


def text_targets(encoders: Mapping[str, Iterable[str]]) -> Targets:
    """Targets of text encoders from {"clip_l" or "clip_g": parameters of transformers' module}.

    Our parameters are named with the encoder before them: clip_l.encoder.layers.0.mlp.fc1.weight.
    """
    table: dict[str, str] = {}
    for encoder, parameters in encoders.items():
        second = encoder == "clip_g" and "clip_l" in encoders
        kohya = ("lora_te2_",) if second else ("lora_te_", "lora_te1_")
        diffusers = "text_encoder_2." if second else "text_encoder."
        for name in parameters:
            path = name if name.startswith("text_projection.") else f"text_model.{name}"
            comfy, ours = f"{encoder}.transformer.{path}", f"{encoder}.{name}"
            table[comfy.removesuffix(".weight")] = ours
            table[f"text_encoders.{comfy.removesuffix('.weight')}"] = ours
            if name.endswith(".weight"):
                module = path.removesuffix(".weight")
                table |= {prefix + module.replace(".", "_"): ours for prefix in kohya}
                table[diffusers + module] = ours
    return Targets(table, _UNET_NAMES)
