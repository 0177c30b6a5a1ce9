from dataclasses import dataclass

import pytest
import torch

from comfy_client.proxies import lora_upload
from comfy_client.proxies.lora_upload import CapturedLora, add_captured, lora_file
from comfy_client.proxies.refusals import NotRemote
from luna_protocol.blob import set_hash

UP, DOWN = torch.ones(4, 2), torch.ones(2, 4)
KEY = "diffusion_model.input_blocks.1.1.proj_in.weight"
LAYER = KEY.removesuffix(".weight")


@dataclass
class Adapter:
    """What ComfyUI's weight adapters have: a format's name and its tensors in that format's order."""

    name: str
    weights: tuple


def test_a_plain_lora_keeps_alpha_and_leaves_out_what_is_none():
    tensors = lora_file({KEY: Adapter("lora", (UP, DOWN, 8.0, None, None, None))})
    assert set(tensors) == {f"{LAYER}.{name}" for name in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert tensors[f"{LAYER}.lora_up.weight"] is UP
    assert tensors[f"{LAYER}.alpha"] == 8.0


def test_each_format_gets_its_own_endings():
    parts = [torch.full((1,), float(i)) for i in range(9)]
    lokr = lora_file({KEY: Adapter("lokr", tuple(parts))})
    assert lokr[f"{LAYER}.lokr_w1"] == 0 and lokr[f"{LAYER}.alpha"] == 2 and lokr[f"{LAYER}.dora_scale"] == 8
    loha = lora_file({KEY: Adapter("loha", tuple(parts[:8]))})
    assert loha[f"{LAYER}.hada_w2_a"] == 3 and loha[f"{LAYER}.dora_scale"] == 7


def test_whole_tensors_for_any_parameter():
    bias, table = f"{LAYER}.bias", "clip_l.transformer.text_model.embeddings.position_embedding.weight"
    assert lora_file({KEY: ("diff", (UP,)), bias: ("diff", (DOWN,))}) == {f"{LAYER}.diff": UP, f"{bias}.diff": DOWN}
    assert lora_file({KEY: (UP,), bias: ("set", (DOWN,))}) == {f"{LAYER}.diff": UP, f"{bias}.set_weight": DOWN}
    assert lora_file({table: ("diff", (UP,))}) == {f"{table.removesuffix('.weight')}.diff": UP}


def test_strength_model_alone_travels_as_a_patch_that_adds_nothing():
    tensors = lora_file({KEY: (None,), f"{LAYER}.bias": ("diff", (None,))})
    assert set(tensors) == {f"{LAYER}.no_diff", f"{LAYER}.bias.no_diff"}
    assert not any(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("patches", "told"),
    [
        ({KEY: ("model_as_lora", (UP,))}, "is of the kind 'model_as_lora'"),
        ({KEY: ("diff", (UP, {"pad_weight": True}))}, "is of the kind 'diff'"),
        ({KEY: [(UP, None), (1.0, (DOWN,), 1.0, None, None)]}, "The merge of another model into .*ModelMergeSimple"),
        ({KEY: Adapter("novel", (UP,))}, "The novel adapter"),
        ({KEY: Adapter("glora", (UP, DOWN, UP, DOWN, None, None, UP))}, "more tensors than its format had"),
        ({(KEY, (0, 0, 4)): Adapter("lora", (UP, DOWN, None, None, None, None))}, "a slice of a weight"),
    ],
)
def test_what_no_file_can_hold_is_refused(patches, told):
    with pytest.raises(NotRemote, match=told):
        lora_file(patches)


def test_the_hash_is_that_of_the_file():
    captured = CapturedLora({KEY: Adapter("lora", (UP, DOWN, None, None, None, None))})
    [content] = captured.parts
    assert content == set_hash({f"{LAYER}.lora_up.weight": UP, f"{LAYER}.lora_down.weight": DOWN})


def test_a_large_lora_comes_in_parts_that_are_whole_layers(monkeypatch):
    monkeypatch.setattr(lora_upload, "PART_BYTES", 100)
    layers = {f"layer_{i}.weight": Adapter("lora", (UP, DOWN, None, None, None, None)) for i in range(4)}  # 64 bytes
    layers["large.weight"] = ("diff", (torch.ones(100),))
    parts = CapturedLora(layers).parts
    assert [len(tensors) for tensors in parts.values()] == [2, 2, 2, 2, 1]
    assert [content == set_hash(tensors) for content, tensors in parts.items()] == [True] * 5


def stack_of(*added):
    """The stack that adding (keys, strength) one after the other makes, as [(keys, strength)]."""
    stack = []
    for keys, strength in added:
        if keys is None:
            stack.append((strength, "a LoRA on the server", 1.0, None, None))
        else:
            add_captured(stack, CapturedLora({key: (UP,) for key in keys}), strength, 1.0)
    captured = [(lora, strength) for strength, lora, *_ in stack if isinstance(lora, CapturedLora)]
    return [(sorted(lora._patches), strength) for lora, strength in captured]


def test_layers_added_one_by_one_are_a_lora_for_each_strength():
    stack = stack_of(*(([f"layer_{index}"], index % 12 / 10) for index in range(700)))
    assert [strength for _, strength in stack] == [index / 10 for index in range(12)]
    assert sum(len(keys) for keys, _ in stack) == 700


def test_layers_never_change_places_with_what_patches_the_same_weight():
    twice = (["a", "b"], 1.0), (["b", "c"], 1.0)
    assert stack_of(*twice) == list(twice)
    behind = (["a"], 1.0), (["b"], 0.5), (["b"], 1.0), (["c"], 1.0), (["c"], 0.5)
    assert stack_of(*behind) == [(["a"], 1.0), (["b"], 0.5), (["b", "c"], 1.0), (["c"], 0.5)]
    assert stack_of((["a"], 1.0), (None, 1.0), (["b"], 1.0)) == [(["a"], 1.0), (["b"], 1.0)]
    slices = ([("a", (0, 0, 4))], 1.0), ([("a", (0, 4, 4))], 1.0)
    assert stack_of(*slices) == list(slices)
