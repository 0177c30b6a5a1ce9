import pytest
import torch

from engine.tensor_cache import TensorCache
from luna_protocol.blob import content_hash
from luna_protocol.errors import Malformed


def filled(cache, count):
    tensors = [torch.full((256,), float(i)) for i in range(count)]
    for tensor in tensors:
        cache.put(content_hash(tensor), tensor)
    return tensors


def test_it_stays_within_its_bytes_and_forgets_the_oldest():
    cache = TensorCache(capacity=4096)
    tensors = filled(cache, 10)
    assert cache.bytes <= 4096
    assert cache.get(content_hash(tensors[0])) is None
    assert torch.equal(cache.get(content_hash(tensors[9])), tensors[9])


def test_use_keeps_alive():
    cache = TensorCache(capacity=3 * 1024)
    first = filled(cache, 3)[0]
    cache.get(content_hash(first))
    cache.put(content_hash(torch.ones(256) * 7), torch.ones(256) * 7)
    assert cache.get(content_hash(first)) is not None


def test_a_wrong_hash_is_refused_and_not_kept():
    cache = TensorCache(capacity=4096)
    with pytest.raises(Malformed, match="has the hash"):
        cache.put("0" * 32, torch.ones(3))
    assert cache.bytes == 0


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(6).half()])
def test_hashes_tell_shape_and_dtype(other):
    same = torch.zeros(6, dtype=torch.bfloat16)
    assert content_hash(same) == content_hash(same.clone())
    assert content_hash(other) != content_hash(same)
