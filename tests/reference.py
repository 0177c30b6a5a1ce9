"""What diffusers and transformers make of a checkpoint by their own converters, to hold ours against."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.checkpoints import SHAPES, CheckpointShape, TextShape


def unet(path: Path, shape: str) -> UNet2DConditionModel:
    """Configured from the shape the file was made from, not from the file."""
    s = SHAPES[shape].unet
    channels = [s.channels * m for m in s.multipliers]
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in s.depths]
    config = {
        "in_channels": s.in_channels,
        "block_out_channels": channels,
        "layers_per_block": s.res_blocks,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "transformer_layers_per_block": [max(depth, 1) for depth in s.depths],
        "cross_attention_dim": s.context,
        "attention_head_dim": [c // 64 for c in channels] if s.linear_projection else 8,
        "use_linear_projection": s.linear_projection,
        "class_embed_type": "projection" if s.y_features else None,
        "projection_class_embeddings_input_dim": s.y_features,
    }
    model = UNet2DConditionModel(**config).eval()
    weights = convert_ldm_unet_checkpoint(load_file(path), dict(model.config))
    model.load_state_dict(weights)
    return model


def vae(path: Path, shape: str) -> AutoencoderKL:
    s = SHAPES[shape].vae
    model = AutoencoderKL(
        block_out_channels=[s.channels * m for m in s.multipliers],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=s.res_blocks,
        latent_channels=4,
    ).eval()
    model.load_state_dict(convert_ldm_vae_checkpoint(load_file(path), dict(model.config)))
    return model


def text_encoder(path: Path, shape: str, encoder: str) -> CLIPTextModelWithProjection:
    s: CheckpointShape = SHAPES[shape]
    weights = load_file(path)
    if encoder == "clip_l":
        model = _text_model(s.clip_l, "quick_gelu")
        prefix = "conditioner.embedders.0.transformer." if s.clip_g else "cond_stage_model.transformer."
        own = {key: tensor for key, tensor in weights.items() if key.startswith(prefix)}
        model.load_state_dict(convert_ldm_clip_checkpoint(own, remove_prefix=prefix), strict=False)
        # The file has no projection, which is to say the identity.
        torch.nn.init.eye_(model.text_projection.weight)
        return model
    model = _text_model(s.clip_g, "gelu")
    model.load_state_dict(
        convert_open_clip_checkpoint(model, weights, prefix="conditioner.embedders.1.model."), strict=False
    )
    return model


def _text_model(shape: TextShape, activation: str) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=shape.width,
        intermediate_size=shape.width * 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        projection_dim=shape.width,
        hidden_act=activation,
        eos_token_id=49407,
    )
    return CLIPTextModelWithProjection(config).eval()
