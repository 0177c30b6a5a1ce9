"""A checkpoint that changes under a loaded model, or between two starts, never answers with wrong numbers."""

import pytest
import torch

from luna_protocol.errors import Broken
from tests import checkpoints
from tests.handlers.test_step_cache_in_batches import request, served  # noqa: F401


@pytest.fixture
def file(tmp_path):
    return tmp_path / "models" / "checkpoints" / "tiny.safetensors"


def test_a_file_overwritten_in_place_breaks_the_model(served, file, tmp_path):  # noqa: F811
    worker = served()
    other = checkpoints.write(tmp_path / "other.safetensors", "tiny_sd15", seed=1).read_bytes()
    with file.open("r+b") as opened:
        opened.write(other)
    for _ in range(2):
        [error] = worker.answer(request(1, 0))
        assert isinstance(error, Broken) and error.status == 503
        assert "tiny.safetensors was overwritten" in error.message
    assert worker.model.worker.state == "failed"


def test_a_file_put_in_its_place_changes_nothing(served, file, tmp_path):  # noqa: F811
    worker = served()
    before = worker.answer(request(1, 0))[0][1]["out"]
    checkpoints.write(tmp_path / "other.safetensors", "tiny_sd15", seed=1).replace(file)
    assert torch.equal(worker.answer(request(1, 0))[0][1]["out"], before)
    file.unlink()
    assert torch.equal(worker.answer(request(1, 0))[0][1]["out"], before)


def test_a_parked_model_does_not_come_back_as_another(served, file, tmp_path):  # noqa: F811
    worker = served()
    before = worker.answer(request(1, 0))[0][1]["out"]
    worker.model.role.weights.park()
    assert torch.equal(worker.answer(request(1, 0))[0][1]["out"], before)
    worker.model.role.weights.park()
    checkpoints.write(tmp_path / "other.safetensors", "tiny_sd15", seed=1).replace(file)
    [error] = worker.answer(request(1, 0))
    assert isinstance(error, Broken) and "not what was loaded" in error.message


def test_another_family_under_the_old_name_is_refused(served, file):  # noqa: F811
    checkpoints.write(file, "tiny_sdxl")
    [error] = served().answer(request(1, 0))
    assert isinstance(error, Broken)
    assert "packed as sd15, and is sdxl now" in error.message
