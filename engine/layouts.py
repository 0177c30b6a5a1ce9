"""Under which names files keep a part, and what each tensor is called in the original (LDM, ComfyUI) layout.

What ComfyUI reads is found here, whatever prefix and layout a file has; what it leaves alone is left out.
"""

import re
from collections.abc import Sequence

from engine.unet_layout import Shapes, names_from_diffusers
from luna_protocol.errors import Impossible

Names = dict[str, str]  # {name in the file: name in the original layout}

_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.", "")
_UNET_ROOTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_DIFFUSERS_UNET = ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight")
_MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_VAE_PREFIXES = ("first_stage_model.", "")
_VAE_ROOTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_TAESD_ROOTS = ("taesd_encoder.", "taesd_decoder.", "vae_scale", "vae_shift")
_TRANSFORMERS_PREFIXES = (
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.transformer.",
    "",
)
_OPEN_CLIP_PREFIXES = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "")
_TABLE = "embeddings.token_embedding.weight"
_TRANSFORMERS_ROOTS = (_TABLE, "embeddings.position_embedding.", "encoder.", "final_layer_norm.")
_OPEN_CLIP_ROOTS = (
    "token_embedding.",
    "positional_embedding",
    "transformer.resblocks.",
    "ln_final.",
    "text_projection",
)
_CLIP_L_WIDTHS_END, _CLIP_H_WIDTH = 1280, 1024

# Of parts that look like ours, and mean something else to ComfyUI.
_FOREIGN = {
    r"\.(scaled_fp8|scale_weight|scale_input|weight_scale\w*|input_scale|comfy_quant|absmax|quant_map)\b": (
        "is quantised with scales of its own",
        "serve its fp16, bf16 or plain fp8 version",
    ),
    r"\.(time_stack|time_mix_blocks|time_mixer|mix_factor)\b": ("is a video model's", "SD1.5 and SDXL can be served"),
}
_VAE_FROM_DIFFUSERS = (
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.(?:to_([qkv])|(q)uery|(k)ey|(v)alue)\.", r"mid.attn_1.\1\2\3\4."),
    (r"mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)\.", "mid.attn_1.proj_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"conv_norm_out\.", "norm_out."),
)


def unet_names(header: Shapes) -> Names | None:
    """The UNet's tensors; None where there is none. diffusers' layout counts too."""
    for prefix in _UNET_PREFIXES:
        if prefix + "input_blocks.0.0.weight" in header:
            return _below(header, prefix, _UNET_ROOTS, "UNet")
        if all(prefix + name in header for name in _DIFFUSERS_UNET):
            own = _below(header, prefix, ("",), "UNet")
            original = names_from_diffusers({name: header[key] for key, name in own.items()})
            return {key: original[name] for key, name in own.items() if name in original}
    return None


def vae_names(header: Shapes) -> Names | None:
    """The VAE's tensors; None where there is none. diffusers' layout counts too."""
    for prefix in _VAE_PREFIXES:
        if prefix + "taesd_decoder.1.weight" in header:
            return _below(header, prefix, _TAESD_ROOTS, "VAE")
        if prefix + "decoder.conv_in.weight" in header:
            names = _below(header, prefix, _VAE_ROOTS, "VAE")
            levels = len({key.split("up_blocks.")[1].split(".")[0] for key in names if "decoder.up_blocks." in key})
            return {key: _vae_from_diffusers(name, levels) for key, name in names.items()} if levels else names
    return None


def encoder_names(header: Shapes) -> dict[str, Names]:
    """{"clip_l" or "clip_g": its tensors}, named as by transformers ("text_model." first) or as by OpenCLIP.

    Raises:
        Impossible: the text encoder of another family.
    """
    encoders: dict[str, Names] = {}
    for prefix in _TRANSFORMERS_PREFIXES:
        for model in ("text_model.", ""):
            if prefix + model + _TABLE in header:
                names = _below(header, prefix + model, _TRANSFORMERS_ROOTS, "text encoder")
                names = {key: f"text_model.{name}" for key, name in names.items()}
                for outer in (prefix, prefix.removesuffix("transformer.")):
                    names |= _below(header, outer, ("text_projection",), "text encoder")
                encoders.setdefault(_encoder(prefix, header[prefix + model + _TABLE]), names)
    for prefix in _OPEN_CLIP_PREFIXES:
        table = prefix + "token_embedding.weight"
        if table in header and prefix + "transformer.resblocks.0.ln_1.weight" in header:
            names = _below(header, prefix, _OPEN_CLIP_ROOTS, "text encoder")
            encoders.setdefault(_encoder(prefix, header[table]), names)
    return encoders


def marker_names(header: Shapes) -> dict[str, str]:
    """{marker: its name in the file} of the tensors by which ComfyUI tells how a UNet was trained, under any prefix."""
    found = {name: next((p + name for p in ("", *_UNET_PREFIXES) if p + name in header), None) for name in _MARKERS}
    return {name: key for name, key in found.items() if key}


def some_of(names: Sequence[str]) -> str:
    """How many names, and the first three of them."""
    return f"{len(names)} tensors ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"


def _below(header: Shapes, prefix: str, roots: tuple[str, ...], what: str) -> Names:
    """The names below `prefix` that begin with one of `roots`, without it."""
    wanted = tuple(prefix + root for root in roots)
    for key in header:
        if key.startswith(wanted):
            for pattern, (reason, hint) in _FOREIGN.items():
                if re.search(pattern, f".{key}"):
                    raise Impossible(f"the {what} {reason} ({key})", hint)
    return {key: key[len(prefix) :] for key in header if key.startswith(wanted)}


def _encoder(prefix: str, table: tuple[int, ...]) -> str:
    """Which encoder has this token table; where its place does not say so, its width does."""
    if prefix.endswith(".model.") or prefix.startswith("conditioner.embedders.1."):
        return "clip_g"
    if table[1] == _CLIP_H_WIDTH:
        raise Impossible("the text encoder is SD2's CLIP-H", "the CLIP-L and CLIP-G of SD1.5 and SDXL can be served")
    return "clip_l" if table[1] < _CLIP_L_WIDTHS_END else "clip_g"


def _vae_from_diffusers(name: str, levels: int) -> str:
    for pattern, original in _VAE_FROM_DIFFUSERS:
        name = re.sub(pattern, original, name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
