"""What runs as one forward, and what does not."""

import pytest
import torch

from engine.unet import UNet
from luna_protocol.messages import FreeU
from tests.handlers.test_step_cache_in_batches import request, served  # noqa: F401


@pytest.fixture
def rows(monkeypatch):
    """The rows of each forward."""
    seen, forward = [], UNet.forward

    def counted(self, x, *arguments, **more):
        seen.append(len(x))
        return forward(self, x, *arguments, **more)

    monkeypatch.setattr(UNet, "forward", counted)
    return seen


ONE = 2 * 8 * 8  # rows x height x width of a request


@pytest.mark.parametrize(
    ("limit", "expected"), [(5 * ONE, [10]), (2 * ONE + 1, [4, 4, 2]), (ONE, [2] * 5), (1, [2] * 5)]
)
def test_a_forward_is_bounded_by_its_latents(served, rows, limit, expected):  # noqa: F811
    worker = served(batch_positions=limit)
    rows.clear()
    replies = worker.answer(*(request(seed, 0) for seed in range(5)))
    assert rows == expected
    for seed, (_, tensors) in enumerate(replies):
        alone = worker.answer(request(seed, 0))[0][1]["out"]
        assert torch.allclose(tensors["out"], alone, atol=1e-4)


def test_requests_with_free_u_run_apart_from_those_without(served, rows):  # noqa: F811
    worker, free_u = served(), (FreeU(version=2, b1=1.3, b2=1.4, s1=0.9, s2=0.2),)
    rows.clear()
    replies = worker.answer(request(1, 0), request(1, 0, free_u=free_u), request(2, 0))
    assert sorted(rows) == [2, 4]
    plain, changed = replies[0][1]["out"], replies[1][1]["out"]
    assert torch.equal(worker.answer(request(1, 0, free_u=free_u))[0][1]["out"], changed)
    assert not torch.allclose(plain, changed, atol=1e-3)


def test_the_model_has_run_once_before_it_is_ready(served, rows):  # noqa: F811
    served()
    assert rows == [2]
