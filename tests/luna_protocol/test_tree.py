"""Nested arguments and results as JSON and tensors."""

import json
import math
import uuid

import pytest
import torch

from luna_protocol.errors import Malformed
from luna_protocol.messages import TreeOutput
from luna_protocol.blob import pack, unpack
from luna_protocol.tree import MAX_DEPTH, TreeWriter, Unsendable, read_tree


def crossed(value, **options):
    """`value` as it is on the other side of a blob."""
    writer = TreeWriter()
    message, tensors = unpack(pack(TreeOutput(tree=writer.write(value)), writer.tensors))
    return read_tree(json.loads(json.dumps(message["tree"])), tensors, **options)


def test_plain_values_keep_their_types():
    value = {
        "none": None,
        "flags": [True, 1, 1.5, "text"],
        "pair": (1, (2.0, "x")),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "id": uuid.UUID(int=7),
        ("block", 3): {0: "whole", "$odd": 1},
        "far": math.inf,
    }
    again = crossed(value)
    assert again == value
    assert [type(item) for item in again["flags"]] == [bool, int, float, str]
    assert isinstance(again["size"], torch.Size)
    assert math.isnan(crossed(math.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_tensors_keep_bits_and_dtype(dtype):
    tensor = torch.randint(0, 2, (3, 5)).to(dtype)
    again = crossed([tensor])[0]
    assert again.dtype == dtype
    assert torch.equal(again.float(), tensor.float())


def test_the_order_of_dimensions_in_memory_stays():
    for tensor in (torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.rand(4, 6).t(), torch.rand(2, 3, 4).permute(2, 0, 1)):
        again = crossed(tensor)
        assert torch.equal(again, tensor)
        assert again.stride() == tensor.stride()


def test_expanded_tensors_come_whole():
    again = crossed(torch.rand(1, 3).expand(4, 3))
    assert again.shape == (4, 3)
    assert again.is_contiguous()


def test_one_tensor_stays_one():
    tensor = torch.rand(3)
    first, second = crossed([tensor, tensor])
    assert first is second


def test_what_is_no_data_is_named():
    with pytest.raises(Unsendable, match=r"options\.patch\[1\] is a builtins\.function"):
        TreeWriter().write({"patch": [1, lambda: None]}, "options")


def test_a_device_is_the_readers_own():
    assert crossed(torch.device("cpu"), device=torch.device("meta")) == torch.device("meta")


def nest(levels):
    tree = 0
    for _ in range(levels):
        tree = [tree]
    return tree


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "absent"},
        {"$tensor": ["t0"]},
        {"$tensor": "t0", "order": [0, 0]},
        {"$tensor": "t0", "order": [5, 6]},
        {"$call": "os.system"},
        {"$dtype": "object"},
        {"$uuid": "no"},
        {"$pairs": [[1]]},
        {"$pairs": [[[1], 2]]},
        {"$nested": []},
        {"$size": "abc"},
        nest(MAX_DEPTH + 1),
        [0] * 100_001,
    ],
)
def test_what_makes_no_sense_is_refused(tree):
    with pytest.raises(Malformed):
        read_tree(tree, {"t0": torch.zeros(2, 3)})
