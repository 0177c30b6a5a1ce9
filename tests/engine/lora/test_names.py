"""Each trainer's spelling of a weight leads to the same parameter."""

import pytest

from engine.lora.names import text_targets, unet_targets
from tests.engine.test_unet import load

TO_OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
SPELLINGS = {
    TO_OUT: [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0",
        "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out",
        "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ],
    "down_blocks.0.downsamplers.0.conv": [
        "lora_unet_input_blocks_2_0_op",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
    ],
    "mid_block.resnets.1.conv1": ["lora_unet_middle_block_2_in_layers_2", "lycoris_mid_block_resnets_1_conv1"],
    "conv_in": ["lora_unet_input_blocks_0_0", "unet.conv_in", "diffusion_model.input_blocks.0.0"],
    "time_embedding.linear_1": ["lora_unet_time_embed_0", "lora_unet_time_embedding_linear_1"],
}


@pytest.mark.parametrize("ours", SPELLINGS)
def test_every_spelling_of_a_unet_weight_is_known(tiny, ours):
    unet = load(tiny, "tiny_sd15")
    targets = unet_targets(unet.names)
    assert f"{ours}.weight" in unet.model.state_dict()
    assert {targets.parameters[name] for name in SPELLINGS[ours]} == {f"{ours}.weight"}


@pytest.mark.parametrize("shape", ["tiny_sd15", "tiny_sdxl"])
def test_every_weight_of_a_unet_can_be_named(tiny, shape):
    unet = load(tiny, shape)
    targets = unet_targets(unet.names)
    parameters = dict(unet.model.named_parameters())
    assert set(targets.parameters.values()) == parameters.keys()
    assert targets.parameters["diffusion_model.input_blocks.0.0.bias"] == "conv_in.bias"


def test_text_encoders_are_numbered_as_sdxl_files_do():
    weight = "encoder.layers.0.self_attn.q_proj.weight"
    both = text_targets({"clip_l": [weight], "clip_g": [weight, "text_projection.weight"]}).parameters
    alone = text_targets({"clip_l": [weight]}).parameters
    for name in (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    ):
        assert both[name] == alone[name] == f"clip_l.{weight}"
    for name in (
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
        "clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    ):
        assert both[name] == f"clip_g.{weight}"
        assert name not in alone
    assert both["lora_te2_text_projection"] == "clip_g.text_projection.weight"
