"""Files as people have them: what ComfyUI reads is served with the same numbers, what it leaves alone is left out."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from handlers.engine.checkpoints import detect, read_header
from handlers.engine.layouts import marker_names
from handlers.engine.text_encoder import TextEncoder
from handlers.engine.trial import try_parts
from handlers.engine.unet import UNet
from handlers.engine.unet_layout import UNetLayout
from handlers.engine.vae import VAE
from handlers.engine.weights import read_markers
from luna_protocol.errors import LunaError
from tests import checkpoints

CPU = torch.device("cpu")
_SD15, _SDXL = checkpoints.SHAPES["tiny_sd15"], checkpoints.SHAPES["tiny_sdxl"]
_VAE = replace(checkpoints.TINY_KL, res_blocks=2)
SD15 = replace(_SD15, unet=replace(_SD15.unet, multipliers=(1, 2), depths=(1, 0)), vae=_VAE)
SDXL = replace(_SDXL, unet=replace(_SDXL.unet, multipliers=(1, 2), depths=(0, 1), middle_depth=1, res_blocks=1))
UNET, CLIP, VAE_PREFIX = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."
CLIP_G = "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def sd15():
    return checkpoints.state_dict(SD15)


@pytest.fixture(scope="module")
def sdxl():
    return checkpoints.state_dict(SDXL)


@pytest.fixture
def built(tmp_path):
    """built(tensors) -> ({component: what it computes}, what `detect` found) of a file with these tensors."""

    def build(tensors):
        path = tmp_path / "file.safetensors"
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
        header = read_header(path)
        found = detect(header)
        try_parts(path, header, found)
        with torch.inference_mode():
            return {component: output for part in found.parts.values() for component, output in run(path, part)}, found

    return build


def run(path, part):
    ones = torch.linspace(-1, 1, 64)
    for component in part.names:
        if component == "unet":
            unet = UNet.load(path, part, torch.float32, CPU)
            width, vector = unet.layout.context_dim, unet.layout.adm_channels
            y = vector and torch.linspace(-1, 1, vector)[None]
            context = torch.linspace(-1, 1, width)[None, None]
            yield "unet", unet.forward(ones.view(1, 4, 4, 4), torch.tensor([500.0]), context, y)
        elif component == "vae":
            vae = VAE.load(path, part, torch.float32, CPU)
            pixels = vae.decode(ones[:16].view(1, 4, 2, 2))
            yield "vae", torch.cat([pixels.flatten(), vae.encode(pixels).flatten()])
        else:
            encoder = TextEncoder.load(path, part, component, torch.float32, CPU)
            hidden, pooled = encoder.encode(torch.tensor([[1, 2, 49407]]))
            yield component, torch.cat([hidden.flatten(), pooled.flatten()])


def below(tensors, prefix):
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[component], other[component]) for component in one)


LEFT_OVER = {
    "CLIP-G's position ids, as ComfyUI saves them": CLIP_G + "transformer.text_model.embeddings.position_ids",
    "the text encoders' logit scales": "conditioner.embedders.0.transformer.logit_scale",
    "an EMA copy": "model_ema.diffusion_modelinput_blocks00weight",
    "an optimizer's state": "optimizer.state.0.exp_avg",
    "the training's schedule": "alphas_cumprod",
    "the VAE's loss": "first_stage_model.loss.discriminator.main.0.weight",
    "a vision tower": CLIP_G + "visual.transformer.resblocks.0.ln_1.weight",
    "an unknown layer of the UNet": UNET + "input_blocks.1.0.gadget.weight",
    "an unknown layer of a transformer": UNET + "middle_block.1.transformer_blocks.0.gadget.weight",
    "an unknown layer of the VAE": "first_stage_model.decoder.gadget.weight",
    "an unknown layer of CLIP-G": CLIP_G + "transformer.resblocks.0.gadget.weight",
}


def test_left_over_tensors_are_left_out_and_named(built, sdxl, caplog):
    expected, _ = built(sdxl)
    caplog.clear()
    outputs, found = built(sdxl | {name: torch.ones(2) for name in LEFT_OVER.values()})
    assert same(outputs, expected)
    unused = found.unused(dict.fromkeys([*sdxl, *LEFT_OVER.values()], (2,)))
    noted = " ".join(unused) + caplog.text
    for name in LEFT_OVER.values():
        assert name.endswith(("position_ids", "logit_scale")) or "gadget" in name or name in noted
    assert "gadget" in caplog.text


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.model.", "net.", "model.", ""])
def test_a_unet_alone_under_any_prefix(built, sd15, prefix):
    expected = built(below(sd15, UNET))[0]
    outputs, found = built(
        {prefix + key: tensor for key, tensor in below(sd15, UNET).items()} | {"v_pred": torch.ones(0)}
    )
    assert (found.family, outputs.keys()) == ("sd15", {"unet"})
    assert same(outputs, expected)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_unet_in_diffusers_layout(built, sd15, sdxl, family):
    original = below(sd15 if family == "sd15" else sdxl, UNET)
    names = UNetLayout.from_shapes({key: tuple(t.shape) for key, t in original.items()}).diffusers_names(original)
    renamed = {names[key].replace("class_embedding.", "add_embedding."): tensor for key, tensor in original.items()}
    outputs, found = built(renamed)
    assert found.family == family
    assert same(outputs, built(original)[0])


@pytest.mark.parametrize("attention", ["to_q to_k to_v to_out.0", "query key value proj_attn"])
@pytest.mark.parametrize("prefix", [VAE_PREFIX, ""])
def test_a_vae_in_diffusers_layout(built, sd15, attention, prefix):
    original = below(sd15, VAE_PREFIX)
    outputs, found = built({prefix + name: t for name, t in as_diffusers(original, attention.split()).items()})
    assert found.parts.keys() == {"vae"}
    assert same(outputs, built(original)[0])


def as_diffusers(vae, attention):
    """diffusers' names for the original's: levels of the decoder the other way round, attention without 1 x 1."""
    names = dict(zip(("q", "k", "v", "proj_out"), attention, strict=True)) | {"norm": "group_norm"}
    renamed = {}
    for key, tensor in vae.items():
        side, *rest = key.split(".")
        match rest:
            case ["down", level, "block", layer, *inner]:
                rest = ["down_blocks", level, "resnets", layer, *inner]
            case ["down", level, "downsample", *inner]:
                rest = ["down_blocks", level, "downsamplers", "0", *inner]
            case ["up", level, "block", layer, *inner]:
                rest = ["up_blocks", str(3 - int(level)), "resnets", layer, *inner]
            case ["up", level, "upsample", *inner]:
                rest = ["up_blocks", str(3 - int(level)), "upsamplers", "0", *inner]
            case ["mid", "attn_1", name, *inner]:
                rest = ["mid_block", "attentions", "0", names[name], *inner]
                tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
            case ["mid", block, *inner]:
                rest = ["mid_block", "resnets", str(int(block[-1]) - 1), *inner]
        name = ".".join([side, *rest]).replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
        renamed[name] = tensor
    return renamed


def test_a_full_clip_l_with_its_vision_tower(built, sd15):
    text = below(sd15, CLIP)
    projection = torch.randn(64, 64)
    whole = text | {"text_projection.weight": projection, "logit_scale": torch.tensor(4.6)}
    whole |= {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": torch.ones(2, 2) for i in range(24)}
    outputs, found = built(whole | {"visual_projection.weight": torch.ones(2, 2)})
    assert (found.family, outputs.keys()) == ("sd15", {"clip_l"})
    assert same(outputs, built(text | {"text_projection.weight": projection})[0])


ENCODER_LAYOUTS = {
    "as transformers": lambda text: text,
    "without text_model": lambda text: {CLIP + key.removeprefix("text_model."): t for key, t in text.items()},
    "bare": lambda text: {key.removeprefix("text_model."): t for key, t in text.items()},
    "of a checkpoint": lambda text: {CLIP + key: t for key, t in text.items()},
}


@pytest.mark.parametrize("layout", ENCODER_LAYOUTS)
def test_clip_l_in_every_layout(built, sd15, layout):
    text = below(sd15, CLIP)
    assert same(built(ENCODER_LAYOUTS[layout](text))[0], built(text)[0])


@pytest.mark.parametrize("prefix", ["", "conditioner.embedders.0.model.", CLIP_G])
def test_clip_g_as_open_clip(built, sdxl, prefix):
    text = below(sdxl, CLIP_G)
    wide = {"token_embedding.weight": torch.ones(49408, 1280)}
    if not prefix:  # alone, only its width shows which encoder it is: packing then refuses these narrow layers
        with pytest.raises(LunaError, match="clip_g"):
            built(text | wide)
        return
    outputs, found = built({prefix + key: tensor for key, tensor in text.items()})
    assert (found.family, outputs.keys()) == ("sdxl", {"clip_g"})
    assert same(outputs, {"clip_g": built(sdxl)[0]["clip_g"]})


def test_clip_g_as_transformers(built, sdxl):
    text = below(sdxl, CLIP_G)
    model = "conditioner.embedders.1.model.transformer."
    renamed = {model + name: tensor for name, tensor in as_transformers(text).items()}
    kept = {key: tensor for key, tensor in sdxl.items() if not key.startswith(CLIP_G)}
    assert same(built(kept | renamed)[0], built(sdxl)[0])


def as_transformers(text):
    renamed = {}
    for key, tensor in text.items():
        name = key.replace("transformer.resblocks.", "text_model.encoder.layers.").replace(".ln_", ".layer_norm")
        name = name.replace(".c_fc.", ".fc1.").replace(".c_proj.", ".fc2.").replace(".attn.out", ".self_attn.out")
        name = name.replace("ln_final", "text_model.final_layer_norm")
        name = name.replace("token_embedding.", "text_model.embeddings.token_embedding.")
        name = name.replace("positional_embedding", "text_model.embeddings.position_embedding.weight")
        if ".attn.in_proj_" in name:
            stem, kind = name.split(".attn.in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{stem}.self_attn.{letter}_proj.{kind}"] = third
        else:
            renamed[name] = tensor
    return renamed


def test_a_refiner_has_its_one_text_encoder(built, sdxl):
    refiner = {key: tensor for key, tensor in sdxl.items() if not key.startswith("conditioner.")}
    refiner |= {f"conditioner.embedders.0.model.{key}": tensor for key, tensor in below(sdxl, CLIP_G).items()}
    outputs, found = built(refiner)
    assert (found.family, outputs.keys()) == ("sdxl", {"unet", "clip_g", "vae"})


@pytest.mark.parametrize("prefix", ["", UNET, "model."])
def test_every_marker_is_read_under_any_prefix(tmp_path, prefix):
    values = {"v_pred": torch.ones(0), "ztsnr": torch.ones(0), "edm_vpred.sigma_max": torch.tensor(80.0)}
    values |= {
        "edm_vpred.sigma_min": torch.tensor([0.002]),
        "edm_mean": torch.ones(1, 4, 1, 1),
        "edm_std": torch.ones(4),
    }
    path = tmp_path / "marked.safetensors"
    save_file({prefix + name: tensor for name, tensor in values.items()}, path)
    found = read_markers(path, marker_names(read_header(path)))
    assert found == {
        **dict.fromkeys(("v_pred", "ztsnr", "edm_mean", "edm_std"), 0),
        "edm_vpred.sigma_max": 80,
        "edm_vpred.sigma_min": pytest.approx(0.002),
    }
