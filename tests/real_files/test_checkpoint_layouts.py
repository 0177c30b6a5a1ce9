"""Files as people have them: what ComfyUI reads is served with the same numbers, what it leaves alone is left out."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoints import detect, read_header
from engine.layouts import marker_names
from engine.text_encoder import TextEncoder
from engine.trial import try_parts
from engine.unet import UNet
from engine.unet_layout import UNetLayout
from engine.vae import VAE
from engine.weights import read_markers
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


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(tensors) -> ({component: what it computes}, what `detect` found) of a file with these tensors."""
    path = tmp_path_factory.mktemp("built") / "file.safetensors"

    def build(tensors):
        path.unlink(missing_ok=True)
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path)
        header = read_header(path)
        found = detect(header)
        try_parts(path, header, found)
        with torch.inference_mode():
            return {component: output for part in found.parts.values() for component, output in run(path, part)}, found

    return build


@pytest.fixture(scope="module")
def sd15_outputs(build, sd15):
    return build(sd15)[0]


@pytest.fixture(scope="module")
def sdxl_outputs(build, sdxl):
    return build(sdxl)[0]


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


def same(outputs, expected, *components):
    """Whether these components, and no others, compute what is expected, bit for bit."""
    return outputs.keys() == set(components) and all(torch.equal(outputs[name], expected[name]) for name in outputs)


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


def test_left_over_tensors_are_left_out_and_named(build, sdxl, sdxl_outputs, caplog):
    outputs, found = build(sdxl | {name: torch.ones(2) for name in LEFT_OVER.values()})
    assert same(outputs, sdxl_outputs, "unet", "vae", "clip_l", "clip_g")
    unused = found.unused(dict.fromkeys([*sdxl, *LEFT_OVER.values()], (2,)))
    noted = " ".join(unused) + caplog.text
    for name in LEFT_OVER.values():
        assert name.endswith(("position_ids", "logit_scale")) or "gadget" in name or name in noted
    assert "gadget" in caplog.text


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.model.", "net.", "model.", ""])
def test_a_unet_alone_under_any_prefix(sd15, prefix):
    names = {key: key.removeprefix(UNET) for key in sd15 if key.startswith(UNET)}
    header = {prefix + name: tuple(sd15[key].shape) for key, name in names.items()}
    found = detect(header | {"v_pred": (0,)})
    assert (found.family, list(found.parts)) == ("sd15", ["unet"])
    assert found.parts["unet"].names["unet"] == {prefix + name: name for name in names.values()}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_unet_in_diffusers_layout(build, sd15, sdxl, sd15_outputs, sdxl_outputs, family):
    original = below(sd15 if family == "sd15" else sdxl, UNET)
    names = UNetLayout.from_shapes({key: tuple(t.shape) for key, t in original.items()}).diffusers_names(original)
    renamed = {names[key].replace("class_embedding.", "add_embedding."): tensor for key, tensor in original.items()}
    outputs, found = build(renamed)
    assert found.family == family
    assert same(outputs, sd15_outputs if family == "sd15" else sdxl_outputs, "unet")


@pytest.mark.parametrize(
    ("prefix", "attention"), [("", "to_q to_k to_v to_out.0"), (VAE_PREFIX, "query key value proj_attn")]
)
def test_a_vae_in_diffusers_layout(build, sd15, sd15_outputs, prefix, attention):
    renamed = as_diffusers(below(sd15, VAE_PREFIX), attention.split())
    outputs, _ = build({prefix + name: tensor for name, tensor in renamed.items()})
    assert same(outputs, sd15_outputs, "vae")


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


def test_a_full_clip_l_with_its_vision_tower(build, sd15):
    text = below(sd15, CLIP)
    projection = torch.randn(64, 64)
    whole = text | {"text_projection.weight": projection, "logit_scale": torch.tensor(4.6)}
    whole |= {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": torch.ones(2, 2) for i in range(24)}
    outputs, found = build(whole | {"visual_projection.weight": torch.ones(2, 2)})
    assert found.family == "sd15"
    assert same(outputs, build(text | {"text_projection.weight": projection})[0], "clip_l")


ENCODER_LAYOUTS = {
    "as transformers": lambda text: text,
    "without text_model": lambda text: {CLIP + key.removeprefix("text_model."): t for key, t in text.items()},
    "bare": lambda text: {key.removeprefix("text_model."): t for key, t in text.items()},
    "of a checkpoint": lambda text: {CLIP + key: t for key, t in text.items()},
}


@pytest.mark.parametrize("layout", ENCODER_LAYOUTS)
def test_clip_l_in_every_layout(build, sd15, sd15_outputs, layout):
    assert same(build(ENCODER_LAYOUTS[layout](below(sd15, CLIP)))[0], sd15_outputs, "clip_l")


def test_clip_g_alone_as_open_clip(build, sdxl, sdxl_outputs):
    outputs, found = build({key: tensor for key, tensor in sdxl.items() if key.startswith(CLIP_G)})
    assert found.family == "sdxl"
    assert same(outputs, sdxl_outputs, "clip_g")


def test_clip_g_without_a_prefix_is_known_by_its_width(sdxl):
    header = {key: tuple(tensor.shape) for key, tensor in below(sdxl, CLIP_G).items()}
    found = detect(header | {"token_embedding.weight": (49408, 1280)})
    assert (found.family, list(found.parts["clip"].names)) == ("sdxl", ["clip_g"])


def test_clip_g_as_transformers(build, sdxl, sdxl_outputs):
    renamed = as_transformers(below(sdxl, CLIP_G))
    outputs, _ = build({f"{CLIP_G}transformer.{name}": tensor for name, tensor in renamed.items()})
    assert same(outputs, sdxl_outputs, "clip_g")


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


def test_a_refiner_has_its_one_text_encoder(build, sdxl, sdxl_outputs):
    refiner = {key: tensor for key, tensor in sdxl.items() if not key.startswith("conditioner.")}
    refiner |= {f"conditioner.embedders.0.model.{key}": tensor for key, tensor in below(sdxl, CLIP_G).items()}
    outputs, found = build(refiner)
    assert found.family == "sdxl"
    assert same(outputs, sdxl_outputs, "unet", "vae", "clip_g")


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
