from dataclasses import dataclass

import pytest
import torch

from comfy_client.proxies.lora_upload import CapturedLora, lora_file
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


def test_full_differences_of_weights_and_biases():
    bias = f"{LAYER}.bias"
    tensors = lora_file({KEY: ("diff", (UP,)), bias: ("diff", (DOWN,))})
    assert tensors == {f"{LAYER}.diff": UP, f"{LAYER}.diff_b": DOWN}


@pytest.mark.parametrize(
    ("patches", "told"),
    [
        ({KEY: ("model_as_lora", (UP,))}, "is of the kind 'model_as_lora'"),
        ({KEY: ("diff", (UP, {"pad_weight": True}))}, "is of the kind 'diff'"),
        ({KEY: Adapter("novel", (UP,))}, "The novel adapter"),
        ({(KEY, (0, 0, 4)): Adapter("lora", (UP, DOWN, None, None, None, None))}, "a slice of a weight"),
    ],
)
def test_what_no_file_can_hold_is_refused(patches, told):
    with pytest.raises(NotRemote, match=told):
        lora_file(patches)


def test_the_hash_is_that_of_the_file():
    captured = CapturedLora({KEY: Adapter("lora", (UP, DOWN, None, None, None, None))})
    assert captured.content == set_hash({f"{LAYER}.lora_up.weight": UP, f"{LAYER}.lora_down.weight": DOWN})
