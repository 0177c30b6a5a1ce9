"""Merging against the formulas of the papers: to the last bit in float32, and to within rounding in float64."""

import pytest
import torch
from torch import Tensor

from engine.lora.files import LoraFiles
from engine.lora.merge import Patch, Scaled, fits, merge
from engine.lora.names import Targets
from tests.loras import FORMATS, ONLY_3X3, file_of, made

SHAPES = {"linear": torch.Size([32, 64]), "1x1": torch.Size([32, 64, 1, 1]), "3x3": torch.Size([32, 16, 3, 3])}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STRENGTHS = ((1.0, 1.0), (0.7, 1.0), (-1.3, 0.9))
CASES = [(form, kind) for form in FORMATS for kind in SHAPES if kind == "3x3" or form not in ONLY_3X3]


def patches_of(tensors: dict[str, Tensor], shape: torch.Size) -> dict[str, Patch]:
    shapes = {"layer.weight": shape, "layer.bias": shape[:1]}
    files = LoraFiles((), Targets({"lora_unet_layer": "layer.weight"}, ()), shapes, 0)
    return files._parse(tensors, tensors.__getitem__).patches


def patch(form: str, shape: torch.Size, seed: int = 0, dtype: torch.dtype = torch.float32) -> Patch:
    return patches_of(file_of(form, {"lora_unet_layer": shape}, seed, dtype), shape)["layer.weight"]


def base(shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.3).to(dtype)


def change(tensors: dict[str, Tensor], weight: Tensor, strength: float) -> Tensor:
    """delta W by the papers, without strength and alpha (OFT: with strength once), in the tensors' own precision."""
    t = {ending.removesuffix(".weight"): tensor for ending, tensor in tensors.items()}
    if "oft_blocks" in t:
        skew = t["oft_blocks"] - t["oft_blocks"].mT
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
        if "alpha" in t and skew.norm() + 1e-8 > t["alpha"]:
            skew = skew * t["alpha"].item() / (skew.norm() + 1e-8)
        turn = (eye + skew) @ torch.inverse(eye - skew)
        if skew.ndim == 4:
            return butterfly(turn * strength + (1 - strength) * eye, weight) * t["rescale"] - weight
        blocks = weight.reshape(*skew.shape[:2], *weight.shape[1:])
        return torch.einsum("bij,bi...->bj...", turn * strength - strength * eye, blocks).reshape(weight.shape)
    if "a1" in t:
        flat = weight.flatten(1)
        if len(t["a1"]) == 3:
            return (t["b2"] @ t["b1"] + (flat @ t["a2"]) @ t["a1"]).reshape(weight.shape)
        mixed = torch.einsum("oj...,jk->ok...", torch.einsum("oi...,ij->oj...", weight, t["a1"]), t["a2"])
        if weight.ndim == 2:
            mixed = (weight @ t["a1"]) @ t["a2"]
        return mixed + (t["b1"] @ t["b2"]).reshape(weight.shape)
    if "lora_mid" in t:
        # Tucker: every kernel position has its own core matrix between up and down.
        down = t["lora_down"][:, :, 0, 0]
        mixed = (down.T @ t["lora_mid"].transpose(0, 1).reshape(len(down), -1)).reshape(
            down.shape[1], len(down), *weight.shape[2:]
        )
        return (t["lora_up"].flatten(1) @ mixed.transpose(0, 1).flatten(1)).reshape(weight.shape)
    if "lora_up" in t:
        return (t["lora_up"].flatten(1) @ t["lora_down"].flatten(1)).reshape(weight.shape)
    if "hada_w1_a" in t:
        return (low_rank(t, "hada_w1", "hada_t1") * low_rank(t, "hada_w2", "hada_t2")).reshape(weight.shape)
    if "lokr_w1" in t or "lokr_w1_a" in t:
        left, right = low_rank(t, "lokr_w1", ""), low_rank(t, "lokr_w2", "lokr_t2")
        left, right = left.reshape(*left.shape, 1), right.reshape(*right.shape[:2], -1)
        product = left[:, None, :, None, :] * right[None, :, None, :, :]
        return product.reshape(weight.shape)
    return t["diff"]


def butterfly(turns: Tensor, weight: Tensor) -> Tensor:
    """Factor i turns blocks of rows, the two halves of each block 2**i * b/2 rows apart."""
    side = turns.shape[-1]
    for index, blocks in enumerate(turns):
        gap = 2**index * side // 2
        pairs = [row for start in range(0, len(weight), 2 * gap) for row in range(start, start + gap)]
        rows = torch.tensor([each for row in pairs for each in (row, row + gap)])
        turned = torch.einsum("bij,bj...->bi...", blocks, weight[rows].reshape(-1, side, *weight.shape[1:]))
        weight = weight.clone()
        weight[rows] = turned.reshape(weight.shape)
    return weight


def low_rank(t: dict[str, Tensor], name: str, core: str) -> Tensor:
    if name in t:
        return t[name]
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    return a @ b if core not in t else torch.einsum("i j k l, j r, i p -> p r k l", t[core], b, a)


def ratio(tensors: dict[str, Tensor]) -> float:
    if "alpha" not in tensors or "oft_blocks" in tensors:
        return 1.0
    full = not any(name.startswith(("lora_", "hada_", "a1")) or name.endswith("_b") for name in tensors)
    rank_of = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2.weight")
    return 1.0 if full else tensors["alpha"].item() / len(next(tensors[n] for n in rank_of if n in tensors))


def reference(tensors: dict[str, Tensor], weight: Tensor, strength: float, strength_model: float) -> Tensor:
    """The merge in the weight's own precision; every product and sum is its own, rounded step."""
    if "set_weight" in tensors:
        return tensors["set_weight"].to(weight.dtype)
    tensors = {name: tensor.to(weight.dtype) for name, tensor in tensors.items()}
    weight = weight * strength_model
    delta = change(tensors, weight, strength)
    if "dora_scale" not in tensors:
        return weight + delta * (strength * ratio(tensors))
    scale, towards = tensors["dora_scale"], weight + delta * ratio(tensors)
    dims = tuple(range(1, weight.ndim)) if len(scale) == len(weight) else (0, *range(2, weight.ndim))
    measured = weight if len(scale) == len(weight) else towards
    # One row (or column) at a time, each summed as one vector.
    rows = measured.flatten(1) if 0 not in dims else measured.transpose(0, 1).flatten(1)
    norm = rows.norm(dim=1).reshape([n if d not in dims else 1 for d, n in enumerate(weight.shape)])
    towards = towards * (scale / (norm + torch.finfo(torch.float32).eps))
    return towards if strength == 1 else weight + strength * (towards - weight)


@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
@pytest.mark.parametrize(("form", "kind"), CASES)
def test_every_format_is_bit_equal_to_the_rule(form: str, kind: str, strengths: tuple[float, float]):
    shape = SHAPES[kind]
    for stored in (torch.float32, torch.float16):
        tensors = made(form, shape, seed=1, dtype=stored)
        for dtype in DTYPES:
            weight = base(shape, dtype)
            before = weight.clone()
            merged = merge(weight, [Scaled(patch(form, shape, 1, stored), *strengths)])
            expected = reference(tensors, weight.float(), *strengths).to(dtype)
            assert merged.dtype == dtype
            assert torch.equal(merged, expected), (form, kind, stored, dtype)
            assert torch.equal(weight, before)
            assert not torch.equal(merged, weight)


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_every_format_follows_the_papers_in_double_precision(form: str, kind: str):
    shape = SHAPES[kind]
    merged = merge(base(shape), [Scaled(patch(form, shape), 0.7)])
    expected = reference(made(form, shape), base(shape).double(), 0.7, 1.0)
    assert torch.allclose(merged.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["lora", "loha", "lokr low rank", "oft", "lora dora out", "diff"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_is_added_in_its_order_and_rounded_once(form: str, dtype: torch.dtype):
    shape = SHAPES["linear"]
    first, second = Scaled(patch(form, shape, 1), 0.8), Scaled(patch("lora", shape, 9), -0.6)
    weight = base(shape, dtype)
    steps = reference(made("lora", shape, 9), reference(made(form, shape, 1), weight.float(), 0.8, 1.0), -0.6, 1.0)
    assert torch.equal(merge(weight, [first, second]), steps.to(dtype))
    turned = reference(made(form, shape, 1), reference(made("lora", shape, 9), weight.float(), -0.6, 1.0), 0.8, 1.0)
    assert torch.equal(merge(weight, [second, first]), turned.to(dtype))


def test_adding_and_subtracting_the_same_patch_leaves_float32_rounding_only():
    shape = SHAPES["linear"]
    weight = base(shape)
    there = Scaled(patch("lora", shape), 1.0)
    back = Scaled(patch("lora", shape), -1.0)
    assert torch.allclose(merge(weight, [there, back]), weight, rtol=0, atol=1e-6)
    assert torch.equal(merge(weight.half(), [there, back]), weight.half())


def test_strength_zero_changes_nothing_unless_it_scales_or_replaces_the_weight():
    shape = SHAPES["linear"]
    assert Scaled(patch("lora", shape), 0.0).changes_nothing
    assert not Scaled(patch("lora", shape), 0.0, 0.5).changes_nothing
    assert not Scaled(patch("set", shape), 0.0).changes_nothing
    weight = base(shape)
    assert torch.equal(merge(weight, [Scaled(patch("lora", shape), 0.0, 0.5)]), weight * 0.5)


def test_a_bias_difference_goes_to_the_bias():
    shape = SHAPES["linear"]
    patches = patches_of(file_of("diff", {"lora_unet_layer": shape}), shape)
    bias = base(shape[:1])
    expected = bias + 0.5 * made("diff", shape)["diff_b"]
    assert torch.equal(merge(bias, [Scaled(patches["layer.bias"], 0.5)]), expected)


def test_what_does_not_fit_is_told_before_anything_is_computed():
    assert fits(patch("lora", SHAPES["linear"]), SHAPES["linear"]) == ""
    assert fits(patch("lora", SHAPES["linear"]), SHAPES["1x1"]) == ""
    assert "[64, 64]" in fits(patch("lora", SHAPES["linear"]), torch.Size([64, 64]))
    swapped = Patch("lora", {"lora_up": torch.ones(64, 4), "lora_down": torch.ones(4, 32)})
    assert "does not fit" in fits(swapped, SHAPES["linear"])
    assert "rank 0" in fits(
        Patch("lora", {"lora_up": torch.ones(32, 0), "lora_down": torch.ones(0, 64)}), SHAPES["1x1"]
    )
