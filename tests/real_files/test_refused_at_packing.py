"""What no worker could serve as ComfyUI would is refused before there is an archive, in one clear sentence."""

import pytest
import torch
from safetensors.torch import save_file

from luna_protocol.errors import LunaError
from serving.archives import pack_checkpoint
from tests import checkpoints
from tests.real_files.test_checkpoint_layouts import CLIP, SD15, UNET, VAE_PREFIX, below


@pytest.fixture(scope="module")
def sd15():
    return checkpoints.state_dict(SD15)


def without(tensors, *names):
    return {key: tensor for key, tensor in tensors.items() if key not in names}


def reshaped(tensors, name):
    return tensors | {name: torch.zeros(7, 7)}


CASES = {
    "a UNet without one layer": (
        lambda t: without(t, UNET + "middle_block.0.in_layers.2.weight"),
        r"UNet lacks mid_block\.resnets\.0\.conv1\.weight",
    ),
    "a UNet without its head": (lambda t: without(t, UNET + "out.2.weight"), r"lacks the tensor out\.2\.weight"),
    "a UNet with a layer of another width": (
        lambda t: reshaped(t, UNET + "time_embed.0.weight"),
        r"UNet does not fit together.*linear_1\.weight",
    ),
    "a VAE without one bias": (
        lambda t: without(t, VAE_PREFIX + "decoder.up.1.upsample.conv.bias"),
        r"vae.*cannot be built|VAE lacks",
    ),
    "a VAE's decoder alone": (
        lambda t: {key: tensor for key, tensor in below(t, VAE_PREFIX).items() if "encoder" not in key},
        r"VAE's encoder has 0 levels",
    ),
    "a text encoder without its norm": (
        lambda t: without(t, CLIP + "text_model.final_layer_norm.weight"),
        r"clip_l lacks final_layer_norm\.weight",
    ),
    "a UNet in fp8 with scales": (
        lambda t: t | {UNET + "middle_block.1.proj_in.scale_weight": torch.ones(1)},
        "quantised with scales",
    ),
    "a UNet in NF4": (
        lambda t: t | {UNET + "middle_block.1.proj_in.weight.absmax": torch.ones(1)},
        "quantised with scales",
    ),
    "a video model": (
        lambda t: t | {UNET + "input_blocks.1.0.time_stack.in_layers.2.weight": torch.ones(1)},
        "video model",
    ),
    "a video model's VAE": (
        lambda t: below(t, VAE_PREFIX) | {"decoder.mid.block_1.mix_factor": torch.ones(1)},
        "video model",
    ),
    "SD2's text encoder": (
        lambda t: {"text_model.embeddings.token_embedding.weight": torch.ones(8, 1024)},
        "CLIP-H",
    ),
    "neither": (lambda t: {"transformer_blocks.0.attn.weight": torch.ones(1)}, "neither UNet, text encoder nor VAE"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_archive_of(sd15, tmp_path, case):
    change, reason = CASES[case]
    path, store = tmp_path / "file.safetensors", tmp_path / "store"
    save_file(change(sd15), path)
    with pytest.raises(LunaError, match=reason):
        pack_checkpoint(path, store, home=tmp_path)
    assert not list(store.glob("*.mar"))


RAW = {
    "a GGUF file": (lambda whole: b"GGUF\x03\x00\x00\x00" + whole, "GGUF"),
    "a pickle": (lambda whole: b"\x80\x02}q\x00.", "pickle"),
    "a page saved in its place": (lambda whole: b"<!DOCTYPE html><html>", "not a safetensors file"),
    "an interrupted download": (lambda whole: whole[: len(whole) // 2], "its header says"),
    "a download with more behind it": (lambda whole: whole + b"\n", "its header says"),
}


@pytest.mark.parametrize("case", RAW)
def test_no_archive_of_bytes_that_are(sd15, tmp_path, case):
    change, reason = RAW[case]
    path, store = tmp_path / "file.safetensors", tmp_path / "store"
    save_file(below(sd15, CLIP), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(LunaError, match=reason):
        pack_checkpoint(path, store, home=tmp_path)
    assert not list(store.glob("*.mar"))
