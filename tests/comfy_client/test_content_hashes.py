import pytest
import torch

from comfy_client import content_hashes
from comfy_client.content_hashes import ContentHashes
from luna_protocol.blob import content_hash


@pytest.fixture
def hashed(monkeypatch):
    """The tensors that were really hashed."""
    seen = []
    monkeypatch.setattr(content_hashes, "content_hash", lambda tensor: (seen.append(tensor), content_hash(tensor))[1])
    return seen


def test_equal_content_is_hashed_once(hashed):
    hashes, context = ContentHashes(), torch.randn(2, 77, 16).half()
    for _ in range(3):
        assert hashes.of(context.clone()) == content_hash(context)
    assert len(hashed) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(8), torch.full((8,), -0.0)),
        (torch.zeros(8), torch.zeros(8, dtype=torch.int32)),
        (torch.zeros(8), torch.zeros(2, 4)),
        (torch.zeros(3, dtype=torch.uint8), torch.tensor([0, 0, 1], dtype=torch.uint8)),
    ],
)
def test_what_differs_is_told_apart(one, other):
    hashes = ContentHashes()
    assert (hashes.of(one), hashes.of(other)) == (content_hash(one), content_hash(other))


def test_a_tensor_written_to_has_a_new_hash():
    hashes, context = ContentHashes(), torch.zeros(16)
    before = hashes.of(context)
    context[3] = 1
    assert hashes.of(context) == content_hash(context) != before


def test_nan_and_strides_do_not_matter(hashed):
    hashes, context = ContentHashes(), torch.full((4, 6), float("nan"))
    context[0] = 1
    assert hashes.of(context) == hashes.of(context.t().contiguous().t()) == content_hash(context)
    assert len(hashed) == 1


def test_only_the_last_few_are_kept(hashed):
    hashes = ContentHashes(kept=2)
    for value in (1, 2, 3, 3, 2, 1):
        hashes.of(torch.full((4,), value))
    assert len(hashed) == 4
