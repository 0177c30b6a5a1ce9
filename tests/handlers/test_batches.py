"""What runs as one forward, and what does not."""

import pytest
import torch

from handlers.engine.unet import UNet
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


def test_the_model_has_run_once_before_it_is_ready(served, rows):  # noqa: F811
    served()
    assert rows == [1]
