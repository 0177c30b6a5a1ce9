"""LoRA files as people have them: bundled embeddings, layers for another model, several formats at once."""

import pytest
import torch
from safetensors.torch import save_file

from engine.lora.files import LoraFiles
from engine.lora.merge import Scaled, merge
from engine.lora.names import text_targets, unet_targets
from engine.unet_layout import UNetLayout
from luna_protocol.messages import LoraUse, Patched
from tests import checkpoints
from tests.loras import file_of

PROJ_IN = "lora_unet_input_blocks_1_1_proj_in"
FIRST_CONVOLUTION = "lora_unet_input_blocks_0_0"
SHAPES = {PROJ_IN: torch.Size([32, 32, 1, 1]), FIRST_CONVOLUTION: torch.Size([32, 4, 3, 3])}


@pytest.fixture(scope="module")
def unets():
    """{checkpoint's shape: (targets, {parameter: shape}) of its UNet}, without weights."""
    found = {}
    for name in ("tiny_sd15", "tiny_sd15_inpaint"):
        tensors = checkpoints.state_dict(checkpoints.SHAPES[name])
        prefix = "model.diffusion_model."
        shapes = {key.removeprefix(prefix): each.shape for key, each in tensors.items() if key.startswith(prefix)}
        names = UNetLayout.from_shapes(shapes).diffusers_names(shapes)
        found[name] = unet_targets(names), {names[key]: shape for key, shape in shapes.items()}
    return found


def read(folder, tensors, targets, shapes):
    save_file(tensors, folder / "lora.safetensors")
    files = LoraFiles((folder,), targets, shapes, 1 << 30)
    return files.get(files.source("lora"))


def text_encoder():
    layer = "encoder.layers.0.mlp.fc1.weight"
    return text_targets({"clip_l": [layer]}), {f"clip_l.{layer}": torch.Size([64, 64])}


def test_bundled_embeddings_asked_of_the_text_encoder_are_ignored_and_named(tmp_path):
    tensors = file_of("lora", SHAPES) | {"bundle_emb.style.string_to_param.*": torch.ones(2, 64)}
    lora = read(tmp_path, tensors, *text_encoder())
    assert not lora.patches and not lora.skipped
    assert lora.unmatched == ("bundle_emb.style.string_to_param.*",)


def test_a_lora_for_four_channels_on_an_inpaint_unet_loses_one_layer_alone(tmp_path, unets):
    four = read(tmp_path, file_of("lora", SHAPES), *unets["tiny_sd15"])
    nine = read(tmp_path, file_of("lora", SHAPES), *unets["tiny_sd15_inpaint"])
    assert four.patches.keys() - nine.patches.keys() == {"conv_in.weight"}
    assert nine.patches.keys() == {"down_blocks.0.attentions.0.proj_in.weight"}
    assert "does not fit a weight of shape [32, 9, 3, 3]" in nine.skipped[FIRST_CONVOLUTION]


def test_a_lora_of_another_family_changes_nothing_and_says_so(tmp_path, unets):
    lora = read(
        tmp_path, file_of("lora", {"lora_unet_double_blocks_0_img_attn_qkv": SHAPES[PROJ_IN]}), *unets["tiny_sd15"]
    )
    assert not lora.patches and len(lora.unmatched) == 3


def test_a_full_difference_beside_a_lora_on_one_layer_is_what_comfyui_takes(tmp_path, unets):
    tensors = file_of("lora", SHAPES) | {f"{PROJ_IN}.diff": torch.ones(SHAPES[PROJ_IN])}
    lora = read(tmp_path, tensors, *unets["tiny_sd15"])
    assert lora.patches["down_blocks.0.attentions.0.proj_in.weight"].kind == "diff"
    assert f"{PROJ_IN}.lora_up.weight" in lora.unmatched and not lora.skipped


def test_unknown_tensors_of_a_trainer_are_ignored_and_named(tmp_path, unets):
    extra = {
        f"{PROJ_IN}.magnitude_of_tomorrow": torch.ones(3),
        "emb_params": torch.ones(1, 64),
        "step": torch.tensor(7),
    }
    lora = read(tmp_path, file_of("lora", SHAPES) | extra, *unets["tiny_sd15"])
    assert len(lora.patches) == 2 and not lora.skipped
    assert sorted(lora.unmatched) == sorted(extra)


def test_attention_multiply_scales_a_weight_and_rounds_once_as_comfyui_does(tmp_path, unets):
    lora = read(tmp_path, {"diffusion_model.input_blocks.1.1.proj_in.no_diff": torch.empty(0)}, *unets["tiny_sd15"])
    [patch] = lora.patches.values()
    for dtype in (torch.float32, torch.float16):
        weight = torch.randn(32, 32, 1, 1).to(dtype)
        # One product in float32 and one rounding: the same on every processor.
        assert torch.equal(merge(weight, [Scaled(patch, 0.0, 1.3)]), (weight.float() * 1.3).to(dtype))
    assert Scaled(patch, 0.0, 1.0).changes_nothing


def test_seven_hundred_uses_are_a_request():
    uses = [LoraUse(content=f"{index:032x}", strength_patch=index) for index in range(700)]
    assert len(Patched(lora=uses).lora) == 700
