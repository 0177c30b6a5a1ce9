import pytest
import torch

from engine.checkpoints import detect, read_header
from tests import checkpoints


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(shape) -> (path, parts) of a small random checkpoint, made once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(shape: str):
        path = folder / f"{shape}.safetensors"
        if not path.exists():
            checkpoints.write(path, shape)
        return path, detect(read_header(path)).parts

    return make


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def noise():
    """noise(*shape) -> the same normal noise for the same order of calls."""
    generator = torch.Generator().manual_seed(11)
    return lambda *shape: torch.randn(*shape, generator=generator)


CPU = torch.device("cpu")
