import gc
from types import SimpleNamespace

import pytest
import torch

from luna_protocol import pinned, shared_memory
from luna_protocol.blob import Blob, unpack
from luna_protocol.messages import UNetForward
from luna_protocol.shared_memory import FOLDER, Attachments, Segment

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here; HTTP bodies carry the blobs")


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


class Runtime:
    """What CUDA's runtime is told; without a GPU, nothing is locked."""

    def __init__(self, error: int = 0):
        self.error, self.locked, self.unlocked = error, {}, []

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        assert start not in self.locked  # CUDA's error 712
        if not self.error:
            self.locked[start] = size
        return self.error

    def cudaHostUnregister(self, start: int) -> int:
        del self.locked[start]
        self.unlocked.append(start)
        return 0


@pytest.fixture
def runtime(monkeypatch):
    told = Runtime()
    cuda = SimpleNamespace(is_initialized=lambda: True, cudart=lambda: told)
    monkeypatch.setattr(pinned.torch, "cuda", cuda)
    return told


def test_a_segment_is_locked_for_as_long_as_it_is_mapped(runtime):
    segment = Segment(1 << 16)
    assert runtime.locked == {address(segment.buffer): 1 << 16}
    del segment
    gc.collect()
    assert runtime.locked == {}


def test_what_is_attached_is_unlocked_before_it_is_unmapped(runtime):
    attachments, segment, other = Attachments(), Segment(4096), Segment(4096)
    view = attachments.view(segment.name, 16)
    theirs = address(view)
    assert {address(segment.buffer), theirs} < runtime.locked.keys()
    del view
    segment.unlink()
    attachments.view(other.name, 16)  # which forgets what has lost its name
    assert runtime.unlocked == [theirs]


def test_memory_that_cannot_be_locked_is_used_as_it_is(runtime, monkeypatch, caplog):
    def next_kernel(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    runtime.error = 2
    monkeypatch.setattr(pinned.torch, "zeros", next_kernel)
    segment = Segment(4096)
    assert "error 2" in caplog.text
    assert bytes(Attachments().view(segment.name, 4096)) == bytes(4096)


def test_without_cuda_nothing_is_locked(monkeypatch):
    monkeypatch.setattr(pinned.torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(pinned.torch.cuda, "cudart", lambda: pytest.fail("asked for"))
    assert shared_memory.pin is pinned.pin
    Segment(4096)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_s_tensors_come_through_locked_memory():
    torch.cuda.init()
    sent = {"x": torch.randn(2, 4, 128, 128, device="cuda").half(), "timesteps": torch.full((2,), 601.0)}
    sent["strided"] = torch.randn(3, 8, 5, device="cuda").transpose(0, 2)
    blob = Blob(UNetForward(), sent)
    segment = Segment(blob.size)
    assert torch.frombuffer(segment.buffer, dtype=torch.uint8).is_pinned()
    blob.write(segment.buffer)
    view = Attachments().view(segment.name, blob.size)
    assert torch.frombuffer(view, dtype=torch.uint8).is_pinned()
    _, received = unpack(view)
    for name, tensor in sent.items():
        assert torch.equal(received[name].to("cuda", non_blocking=True), tensor.to("cuda"))
