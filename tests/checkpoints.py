"""Small random checkpoints in the original single-file layout, seeded and so the same on every machine.

`write(path, "sd15")` makes a file real ComfyUI accepts: the widths it fixes (UNet 320, text encoders 768 and 1280,
KL-VAE 128) are kept, depth and channel multipliers are cut. The `tiny` shapes keep the layout and cut the widths too,
for tests of our own engine only. Text encoders of the shapes for ComfyUI keep all layers, because ComfyUI leaves
missing ones uninitialised: 246 MB (fp16) for SD1.5, 1.6 GB for SDXL.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY, POSITIONS = 49408, 77
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class UNetShape:
    """One entry of `multipliers` and `depths` per resolution; `depths` counts transformer blocks per attention."""

    context: int
    channels: int = 320
    multipliers: tuple[int, ...] = (1, 1, 1)
    depths: tuple[int, ...] = (1, 1, 0)
    middle_depth: int = 1
    res_blocks: int = 1
    in_channels: int = 4
    out_channels: int = 4
    y_features: int | None = None
    linear_projection: bool = False


@dataclass(frozen=True)
class TextShape:
    width: int
    layers: int


@dataclass(frozen=True)
class VaeShape:
    """KL autoencoder in the LDM layout; `tiny_autoencoder=True` writes TAESD's layout instead, `channels` wide."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    tiny_autoencoder: bool = False


@dataclass(frozen=True)
class CheckpointShape:
    """`latent_scale` is the family's UNet-space factor, which a TAESD inside a checkpoint carries as a tensor."""

    unet: UNetShape
    clip_l: TextShape
    vae: VaeShape
    clip_g: TextShape | None = None
    latent_scale: float = 0.18215

    def with_vae(self, vae: VaeShape) -> "CheckpointShape":
        return replace(self, vae=vae)


KL, TINY_KL, TAESD = VaeShape(), VaeShape(32, (1, 1, 2, 2), 1), VaeShape(64, tiny_autoencoder=True)
CLIP_L, CLIP_G = TextShape(768, 12), TextShape(1280, 32)

_SD15 = CheckpointShape(UNetShape(context=768), CLIP_L, TAESD)
_SDXL_UNET = UNetShape(
    context=2048, depths=(0, 1, 2), middle_depth=2, res_blocks=2, y_features=2816, linear_projection=True
)
_TINY_SD15 = CheckpointShape(UNetShape(context=64, channels=32, multipliers=(1, 2, 2)), TextShape(64, 2), TINY_KL)

SHAPES = {
    "sd15": _SD15,
    "sd15_inpaint": replace(_SD15, unet=replace(_SD15.unet, in_channels=9)),
    # FreeU acts where 2 and 4 times the first level's channels enter an output block.
    "sd15_wide": replace(_SD15, unet=replace(_SD15.unet, multipliers=(1, 2, 4), depths=(1, 0, 0))),
    "sdxl": CheckpointShape(_SDXL_UNET, CLIP_L, TAESD, clip_g=CLIP_G, latent_scale=0.13025),
    "tiny_sd15": _TINY_SD15,
    "tiny_sd15_inpaint": replace(_TINY_SD15, unet=replace(_TINY_SD15.unet, in_channels=9)),
    "tiny_sdxl": CheckpointShape(
        replace(_SDXL_UNET, context=192, channels=64, y_features=128 + 6 * 256),
        TextShape(64, 2),
        TINY_KL,
        clip_g=TextShape(128, 2),
        latent_scale=0.13025,
    ),
}


class _Weights(dict):
    """A state dict that fills itself with seeded normal noise small enough for activations to stay near one."""

    def __init__(self, dtype: torch.dtype, seed: int):
        super().__init__()
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, key: str, *shape: int, std: float):
        self[key] = (torch.randn(*shape, generator=self.generator) * std).to(self.dtype)

    def layer(self, name: str, out: int, *inner: int, bias: bool = True):
        fan_in = 1
        for size in inner:
            fan_in *= size
        self.noise(f"{name}.weight", out, *inner, std=fan_in**-0.5)
        if bias:
            self.noise(f"{name}.bias", out, std=0.02)

    def norm(self, name: str, width: int):
        self.noise(f"{name}.weight", width, std=0.05)
        self[f"{name}.weight"] += 1
        self.noise(f"{name}.bias", width, std=0.02)


class _Shapes(_Weights):
    """The same tensors without their values."""

    def __init__(self):
        super().__init__(torch.float32, 0)

    def noise(self, key: str, *shape: int, std: float):
        self[key] = torch.empty(shape, device="meta")


def _unet_res_block(w: _Weights, name: str, inner: int, out: int, time: int):
    w.norm(f"{name}.in_layers.0", inner)
    w.layer(f"{name}.in_layers.2", out, inner, 3, 3)
    w.layer(f"{name}.emb_layers.1", out, time)
    w.norm(f"{name}.out_layers.0", out)
    w.layer(f"{name}.out_layers.3", out, out, 3, 3)
    if inner != out:
        w.layer(f"{name}.skip_connection", out, inner, 1, 1)


def _transformer(w: _Weights, name: str, width: int, depth: int, shape: UNetShape):
    kernel = () if shape.linear_projection else (1, 1)
    w.norm(f"{name}.norm", width)
    w.layer(f"{name}.proj_in", width, width, *kernel)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, inner in (("attn1", width), ("attn2", shape.context)):
            w.layer(f"{block}.{attention}.to_q", width, width, bias=False)
            w.layer(f"{block}.{attention}.to_k", width, inner, bias=False)
            w.layer(f"{block}.{attention}.to_v", width, inner, bias=False)
            w.layer(f"{block}.{attention}.to_out.0", width, width)
        w.layer(f"{block}.ff.net.0.proj", 8 * width, width)
        w.layer(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            w.norm(f"{block}.{norm}", width)
    w.layer(f"{name}.proj_out", width, width, *kernel)


def _unet_encoder(w: _Weights, name: str, shape: UNetShape) -> list[int]:
    """Time embedding, input blocks and middle block; returns the width of every skip connection, first block first."""
    time = 4 * shape.channels
    w.layer(f"{name}.time_embed.0", time, shape.channels)
    w.layer(f"{name}.time_embed.2", time, time)
    if shape.y_features:
        w.layer(f"{name}.label_emb.0.0", time, shape.y_features)
        w.layer(f"{name}.label_emb.0.2", time, time)
    w.layer(f"{name}.input_blocks.0.0", shape.channels, shape.in_channels, 3, 3)
    skips = [shape.channels]
    for level, (multiplier, depth) in enumerate(zip(shape.multipliers, shape.depths, strict=True)):
        width = shape.channels * multiplier
        for _ in range(shape.res_blocks):
            block = f"{name}.input_blocks.{len(skips)}"
            _unet_res_block(w, f"{block}.0", skips[-1], width, time)
            if depth:
                _transformer(w, f"{block}.1", width, depth, shape)
            skips.append(width)
        if level < len(shape.multipliers) - 1:
            w.layer(f"{name}.input_blocks.{len(skips)}.0.op", width, width, 3, 3)
            skips.append(width)
    _unet_res_block(w, f"{name}.middle_block.0", width, width, time)
    _transformer(w, f"{name}.middle_block.1", width, shape.middle_depth, shape)
    _unet_res_block(w, f"{name}.middle_block.2", width, width, time)
    return skips


def _unet(w: _Weights, name: str, shape: UNetShape):
    skips = _unet_encoder(w, name, shape)
    inner, index = skips[-1], 0
    for level in reversed(range(len(shape.multipliers))):
        width, depth = shape.channels * shape.multipliers[level], shape.depths[level]
        for i in range(shape.res_blocks + 1):
            block = f"{name}.output_blocks.{index}"
            _unet_res_block(w, f"{block}.0", inner + skips.pop(), width, 4 * shape.channels)
            if depth:
                _transformer(w, f"{block}.1", width, depth, shape)
            if level and i == shape.res_blocks:
                w.layer(f"{block}.{2 if depth else 1}.conv", width, width, 3, 3)
            inner, index = width, index + 1
    w.norm(f"{name}.out.0", inner)
    w.layer(f"{name}.out.2", shape.out_channels, inner, 3, 3)


def _clip_l(w: _Weights, name: str, shape: TextShape):
    name = f"{name}.transformer.text_model"
    w.noise(f"{name}.embeddings.token_embedding.weight", VOCABULARY, shape.width, std=0.5)
    w.noise(f"{name}.embeddings.position_embedding.weight", POSITIONS, shape.width, std=0.1)
    w[f"{name}.embeddings.position_ids"] = torch.arange(POSITIONS).unsqueeze(0)
    for i in range(shape.layers):
        layer = f"{name}.encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            w.layer(f"{layer}.self_attn.{projection}", shape.width, shape.width)
        w.norm(f"{layer}.layer_norm1", shape.width)
        w.layer(f"{layer}.mlp.fc1", 4 * shape.width, shape.width)
        w.layer(f"{layer}.mlp.fc2", shape.width, 4 * shape.width)
        w.norm(f"{layer}.layer_norm2", shape.width)
    w.norm(f"{name}.final_layer_norm", shape.width)


def _clip_g(w: _Weights, name: str, shape: TextShape):
    w.noise(f"{name}.token_embedding.weight", VOCABULARY, shape.width, std=0.5)
    w.noise(f"{name}.positional_embedding", POSITIONS, shape.width, std=0.1)
    for i in range(shape.layers):
        layer = f"{name}.transformer.resblocks.{i}"
        w.noise(f"{layer}.attn.in_proj_weight", 3 * shape.width, shape.width, std=shape.width**-0.5)
        w.noise(f"{layer}.attn.in_proj_bias", 3 * shape.width, std=0.02)
        w.layer(f"{layer}.attn.out_proj", shape.width, shape.width)
        w.norm(f"{layer}.ln_1", shape.width)
        w.layer(f"{layer}.mlp.c_fc", 4 * shape.width, shape.width)
        w.layer(f"{layer}.mlp.c_proj", shape.width, 4 * shape.width)
        w.norm(f"{layer}.ln_2", shape.width)
    w.norm(f"{name}.ln_final", shape.width)
    w.noise(f"{name}.text_projection", shape.width, shape.width, std=shape.width**-0.5)
    w[f"{name}.logit_scale"] = torch.tensor(4.6052, dtype=w.dtype)


def _vae_res_block(w: _Weights, name: str, inner: int, out: int):
    w.norm(f"{name}.norm1", inner)
    w.layer(f"{name}.conv1", out, inner, 3, 3)
    w.norm(f"{name}.norm2", out)
    w.layer(f"{name}.conv2", out, out, 3, 3)
    if inner != out:
        w.layer(f"{name}.nin_shortcut", out, inner, 1, 1)


def _vae_middle(w: _Weights, name: str, width: int):
    _vae_res_block(w, f"{name}.block_1", width, width)
    w.norm(f"{name}.attn_1.norm", width)
    for projection in ("q", "k", "v", "proj_out"):
        w.layer(f"{name}.attn_1.{projection}", width, width, 1, 1)
    _vae_res_block(w, f"{name}.block_2", width, width)


def _kl_vae(w: _Weights, name: str, shape: VaeShape):
    widths = [shape.channels * m for m in shape.multipliers]
    last = len(widths) - 1
    w.layer(f"{name}.encoder.conv_in", shape.channels, 3, 3, 3)
    inner = shape.channels
    for level, width in enumerate(widths):
        for i in range(shape.res_blocks):
            _vae_res_block(w, f"{name}.encoder.down.{level}.block.{i}", inner, width)
            inner = width
        if level < last:
            w.layer(f"{name}.encoder.down.{level}.downsample.conv", width, width, 3, 3)
    _vae_middle(w, f"{name}.encoder.mid", inner)
    w.norm(f"{name}.encoder.norm_out", inner)
    w.layer(f"{name}.encoder.conv_out", 8, inner, 3, 3)
    w.layer(f"{name}.quant_conv", 8, 8, 1, 1)

    w.layer(f"{name}.post_quant_conv", 4, 4, 1, 1)
    w.layer(f"{name}.decoder.conv_in", inner, 4, 3, 3)
    _vae_middle(w, f"{name}.decoder.mid", inner)
    for level in reversed(range(len(widths))):
        width = widths[level]
        for i in range(shape.res_blocks + 1):
            _vae_res_block(w, f"{name}.decoder.up.{level}.block.{i}", inner, width)
            inner = width
        if level:
            w.layer(f"{name}.decoder.up.{level}.upsample.conv", width, width, 3, 3)
    w.norm(f"{name}.decoder.norm_out", inner)
    w.layer(f"{name}.decoder.conv_out", 3, inner, 3, 3)


def _taesd(w: _Weights, name: str, width: int, latent_scale: float):
    """Madebyollin's TAESD: convolutions at `convs`, three-convolution blocks at `blocks` of one nn.Sequential each."""

    def half(
        part: str, first: tuple[int, int, int], last: tuple[int, int, int], resamples: list[int], blocks: list[int]
    ):
        for index, out, inner in (first, last):
            w.layer(f"{name}.{part}.{index}", out, inner, 3, 3)
        for index in resamples:
            w.layer(f"{name}.{part}.{index}", width, width, 3, 3, bias=False)
        for index in blocks:
            for conv in (0, 2, 4):
                w.layer(f"{name}.{part}.{index}.conv.{conv}", width, width, 3, 3)

    half("taesd_encoder", (0, width, 3), (14, 4, width), [2, 6, 10], [1, 3, 4, 5, 7, 8, 9, 11, 12, 13])
    half("taesd_decoder", (1, width, 4), (19, 3, width), [7, 12, 17], [3, 4, 5, 8, 9, 10, 13, 14, 15, 18])
    w[f"{name}.vae_scale"] = torch.tensor(latent_scale)
    w[f"{name}.vae_shift"] = torch.tensor(0.0)


def state_dict(shape: CheckpointShape, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    w = _Weights(dtype, seed)
    _unet(w, "model.diffusion_model", shape.unet)
    if shape.clip_g:
        _clip_l(w, "conditioner.embedders.0", shape.clip_l)
        _clip_g(w, "conditioner.embedders.1.model", shape.clip_g)
    else:
        _clip_l(w, "cond_stage_model", shape.clip_l)
    if shape.vae.tiny_autoencoder:
        _taesd(w, "first_stage_model", shape.vae.channels, shape.latent_scale)
    else:
        _kl_vae(w, "first_stage_model", shape.vae)
    return dict(w)


def write(
    path: Path,
    shape: str | CheckpointShape,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vae: VaeShape | None = None,
) -> Path:
    """Write one checkpoint as safetensors. `shape`: a name in `SHAPES` or your own; `vae` replaces its VAE."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state_dict(shape.with_vae(vae) if vae else shape, dtype, seed), path)
    return path


def shifted(path: Path, offset: int, target: Path) -> Path:
    """A copy of a safetensors file whose tensors begin at `offset` modulo 64, as other writers' headers have it."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        data = file.read()
    header += b" " * ((offset - 8 - len(header)) % 64)
    target.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return target


def write_controlnet(
    path: Path, shape: str | CheckpointShape, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Path:
    """A ControlNet of the same UNet shape, LDM layout (`control_model.*`), with zero convolutions that are not zero."""
    unet = (SHAPES[shape] if isinstance(shape, str) else shape).unet
    w = _Weights(dtype, seed)
    skips = _unet_encoder(w, "control_model", unet)
    hint_widths = (3, 16, 16, 32, 32, 96, 96, 256, unet.channels)
    for i in range(8):
        w.layer(f"control_model.input_hint_block.{2 * i}", hint_widths[i + 1], hint_widths[i], 3, 3)
    for i, width in enumerate(skips):
        w.layer(f"control_model.zero_convs.{i}.0", width, width, 1, 1)
    w.layer("control_model.middle_block_out.0", skips[-1], skips[-1], 1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(w), path)
    return path


def write_lora(
    path: Path,
    shape: str | CheckpointShape,
    rank: int = 4,
    alpha: float | None = 2.0,
    size: float = 0.3,
    dtype: torch.dtype = torch.float32,
    seed: int = 2,
) -> Path:
    """A kohya LoRA over all attention and feed-forward layers of UNet and text encoders.

    Of a second text encoder it patches the first layer and the last two: whoever applies it keeps a copy of these.

    `size` is the standard deviation of up times down relative to a layer's own weights, before alpha / rank.
    """
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    w = _Shapes()
    _unet(w, "model.diffusion_model", shape.unet)
    _clip_l(w, "text", shape.clip_l)
    text = "lora_te1" if shape.clip_g else "lora_te"
    names = {}
    for key, weight in w.items():
        name = key.removesuffix(".weight")
        if name.startswith("model.diffusion_model.") and (".attn" in name or ".ff." in name or ".proj_" in name):
            names["lora_unet_" + name.removeprefix("model.diffusion_model.").replace(".", "_")] = weight
        elif name.startswith("text.") and (".self_attn." in name or ".mlp." in name):
            names[f"{text}_" + name.removeprefix("text.transformer.").replace(".", "_")] = weight
    if shape.clip_g:
        width = shape.clip_g.width
        for i in sorted({0, shape.clip_g.layers - 2, shape.clip_g.layers - 1}):
            layer = f"lora_te2_text_model_encoder_layers_{i}"
            names |= {f"{layer}_self_attn_{p}_proj": torch.empty(width, width) for p in ("q", "k", "v", "out")}
            names |= {
                f"{layer}_mlp_fc1": torch.empty(4 * width, width),
                f"{layer}_mlp_fc2": torch.empty(width, 4 * width),
            }

    lora = _Weights(dtype, seed)
    for name, weight in names.items():
        if weight.dim() < 2:
            continue
        out, inner, *kernel = weight.shape
        lora.noise(f"{name}.lora_down.weight", rank, inner, *kernel, std=(inner * rank) ** -0.5)
        lora.noise(f"{name}.lora_up.weight", out, rank, *[1 for _ in kernel], std=size)
        if alpha is not None:
            lora[f"{name}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(lora), path)
    return path


def write_embedding(path: Path, shape: str | CheckpointShape, vectors: int = 3, seed: int = 3) -> Path:
    """A textual inversion of `vectors` tokens, in the form its family uses (`emb_params`, or `clip_l` and `clip_g`)."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    w = _Weights(torch.float32, seed)
    if shape.clip_g:
        w.noise("clip_l", vectors, shape.clip_l.width, std=0.5)
        w.noise("clip_g", vectors, shape.clip_g.width, std=0.5)
    else:
        w.noise("emb_params", vectors, shape.clip_l.width, std=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(w), path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write one small random checkpoint.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kl-vae", action="store_true", help="the full KL-VAE instead of TAESD")
    arguments = parser.parse_args()
    made = write(
        arguments.path, arguments.shape, DTYPES[arguments.dtype], arguments.seed, KL if arguments.kl_vae else None
    )
    print(f"{made}: {made.stat().st_size / 2**20:.0f} MiB")
