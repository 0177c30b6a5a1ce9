"""What operators write for budgets is read as they mean it, or refused with the form that works."""

import pytest

from engine.memory_budget import Budgets, gigabytes
from luna_protocol.errors import Malformed


def test_sizes_in_decimal_and_binary_units():
    budgets = Budgets.parse("0=20GB, 1=1.5gib,cpu=500MB")
    assert tuple(budgets.of(device, None) for device in ("0", "1", "cpu")) == (20 * 10**9, 3 << 29, 500 * 10**6)


def test_a_cpu_has_no_budget_unless_given():
    assert Budgets.parse("").of("cpu", None) is None


def test_a_gpu_keeps_a_quarter_for_activations_unless_told():
    assert Budgets.parse("0=20GB").of("1", 8 << 30) == 6 << 30
    assert Budgets.parse("1=7GiB").of("1", 8 << 30) == 7 << 30


def test_small_sizes_are_told_in_megabytes():
    assert [gigabytes(size) for size in (0, 3_500_000, 20 * 10**9)] == ["0.0 MB", "3.5 MB", "20.00 GB"]


@pytest.mark.parametrize("text", ["0", "0=20", "gpu0=1GB", "0=-1GB", "cpu=1TB", "0=1GB;1=1GB"])
def test_what_cannot_be_read_is_named(text):
    with pytest.raises(Malformed, match="DEVICE=SIZE"):
        Budgets.parse(text)
