import pytest
import torch

from engine.unet import UNet
from engine.unet_layout import UNetLayout
from luna_protocol.errors import Malformed
from tests import checkpoints, reference
from tests.engine.conftest import CPU

FAMILIES = ["tiny_sd15", "tiny_sd15_inpaint", "tiny_sdxl"]


def load(tiny, shape, dtype=torch.float32):
    path, parts = tiny(shape)
    return UNet.load(path, parts["unet"], dtype, CPU)


def arguments(unet, noise, rows, sides, tokens=77):
    layout = unet.layout
    y = None if layout.adm_channels is None else noise(rows, layout.adm_channels)
    steps = torch.linspace(3.5, 981.25, rows)
    return noise(rows, layout.in_channels, *sides), steps, noise(rows, tokens, layout.context_dim), y


@pytest.mark.parametrize("shape", FAMILIES)
@pytest.mark.parametrize(("rows", "sides", "tokens"), [(1, (8, 8), 77), (2, (13, 9), 154), (4, (7, 24), 231)])
def test_equals_diffusers_bit_for_bit(tiny, noise, shape, rows, sides, tokens):
    unet = load(tiny, shape)
    theirs = reference.unet(tiny(shape)[0], shape)
    if unet.layout.use_linear:
        # The one place where ComfyUI, and so our UNet, lays tokens out otherwise; without it the last bits differ.
        for name, module in theirs.named_modules():
            if name.endswith(".proj_in"):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    x, steps, context, y = arguments(unet, noise, rows, sides, tokens)
    expected = theirs(x, steps, context, class_labels=y).sample
    assert torch.equal(unet.forward(x, steps, context, y), expected)


def test_sdxl_differs_from_plain_diffusers_in_the_last_bits_only(tiny, noise):
    unet = load(tiny, "tiny_sdxl")
    x, steps, context, y = arguments(unet, noise, 2, (16, 16))
    plain = reference.unet(tiny("tiny_sdxl")[0], "tiny_sdxl")(x, steps, context, class_labels=y).sample
    assert (unet.forward(x, steps, context, y) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("place", ["input", "middle", "output"])
def test_each_control_residual_counts(tiny, noise, place):
    unet = load(tiny, "tiny_sd15")
    x, steps, context, _ = arguments(unet, noise, 1, (8, 8))
    plain, seen = unet.forward(x, steps, context), []
    for index, residual in enumerate(residuals(unet, x, steps, context)[place]):
        control = {place: [None] * index + [torch.ones_like(residual)]}
        seen.append(unet.forward(x, steps, context, control=control))
        assert not torch.equal(seen[-1], plain), (place, index)
    assert len({out.sum().item() for out in seen}) == len(seen)


def residuals(unet, x, steps, context):
    """One tensor of the right shape for each place that takes a residual."""
    emb, h, skips = unet.embed(steps, None), x, []
    for block in unet.input_blocks:
        h = unet.run(block, h, emb, context)
        skips.append(h)
    return {"input": skips, "middle": [unet.run(unet.middle_block, h, emb, context)], "output": skips[::-1]}


def test_output_residuals_are_diffusers_own(tiny, noise):
    """diffusers takes ControlNet's residuals shallowest first, ComfyUI (and we) deepest first."""
    unet = load(tiny, "tiny_sd15")
    x, steps, context, _ = arguments(unet, noise, 2, (8, 8))
    found = residuals(unet, x, steps, context)
    control = {place: [noise(*r.shape) for r in found[place]] for place in ("middle", "output")}
    theirs = reference.unet(tiny("tiny_sd15")[0], "tiny_sd15")
    expected = theirs(
        x,
        steps,
        context,
        down_block_additional_residuals=control["output"][::-1],
        mid_block_additional_residual=control["middle"][0],
    ).sample
    assert torch.equal(unet.forward(x, steps, context, control=control), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_fp32(tiny, noise, dtype):
    exact, half = load(tiny, "tiny_sd15"), load(tiny, "tiny_sd15", dtype)
    x, steps, context, _ = arguments(exact, noise, 1, (8, 8))
    out = half.forward(x.to(dtype), steps, context.to(dtype))
    expected = exact.forward(x, steps, context)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() / expected.abs().max() < (0.01 if dtype == torch.float16 else 0.06)


def test_weights_are_frozen(tiny):
    unet = load(tiny, "tiny_sd15")
    assert not unet.model.training
    assert not any(parameter.requires_grad for parameter in unet.model.parameters())


def test_layout_is_read_from_shapes(tiny):
    layout = load(tiny, "tiny_sdxl").layout
    shape = checkpoints.SHAPES["tiny_sdxl"].unet
    assert layout.channels == tuple(shape.channels * m for m in shape.multipliers)
    assert layout.input_depths == ((0, 0), (1, 1), (2, 2))
    assert layout.output_depths == ((2, 2, 2), (1, 1, 1), (0, 0, 0))
    assert (layout.context_dim, layout.adm_channels, layout.use_linear) == (shape.context, shape.y_features, True)


@pytest.mark.parametrize("shape", FAMILIES)
def test_names_lead_there_and_back(tiny, shape):
    unet = load(tiny, shape)
    back = {theirs: original for original, theirs in unet.names.items()}
    assert unet.layout.original_names(unet.model.state_dict()) == back


def test_a_missing_block_is_named(tiny):
    shapes = {key: (32, 32) for key in ("input_blocks.0.0.weight", "out.2.weight")}
    with pytest.raises(Malformed, match=r"middle of a level"):
        UNetLayout.from_shapes(shapes)


def test_a_stray_tensor_has_no_name(tiny):
    layout = load(tiny, "tiny_sd15").layout
    assert layout.diffusers_names(["input_blocks.9.0.gadget.weight", "out.2.bias"]) == {"out.2.bias": "conv_out.bias"}
