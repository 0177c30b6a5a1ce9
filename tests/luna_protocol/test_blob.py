import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from luna_protocol.blob import Blob, content_hash, pack, set_hash, unpack
from luna_protocol.errors import Malformed, TooLarge
from luna_protocol.messages import UNetForward
from luna_protocol.save_job import PictureGroup, SaveJob

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(5)
    mixed = {str(dtype)[6:]: torch.randn(3, 5, 2, generator=generator).to(dtype) for dtype in DTYPES}
    return mixed | {
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(4, 0, dtype=torch.float16),
        "odd": torch.arange(7, dtype=torch.uint8),
        "strided": torch.arange(24.0).view(4, 6).t()[::2],
        "large": torch.randn(2, 4, 64, 64, generator=generator).half(),
    }


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and content_hash(one) == content_hash(other)


def test_what_is_packed_is_unpacked(tensors):
    message, back = unpack(pack(UNetForward(), tensors))
    assert message == UNetForward().model_dump(mode="json")
    assert back.keys() == tensors.keys()
    assert all(same(tensors[name], back[name]) for name in tensors)


def test_the_safetensors_library_reads_ours(tensors, tmp_path):
    theirs = load(bytes(pack(UNetForward(), tensors)))
    assert theirs.keys() == tensors.keys()
    assert all(same(tensors[name], theirs[name]) for name in tensors)
    file = tmp_path / "blob.safetensors"
    file.write_bytes(pack(UNetForward(), tensors))
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["luna"])["message"]["kind"] == "unet_forward"


def test_the_safetensors_librarys_are_read(tensors):
    told = {"luna": json.dumps({"message": {"kind": "any"}})}
    message, back = unpack(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=told))
    assert message == {"kind": "any"}
    assert all(same(tensors[name], back[name]) for name in tensors)


@pytest.mark.parametrize("begin", [0, 16, 40, 61])
@pytest.mark.parametrize("give", [memoryview, memoryview.toreadonly, bytes], ids=["writable", "read-only", "bytes"])
def test_every_tensor_is_aligned_wherever_the_blob_begins(tensors, begin, give):
    blob = pack(UNetForward(), tensors)
    memory = torch.empty(len(blob) + 64, dtype=torch.uint8)[begin:]
    view = memoryview(memory.numpy())[: len(blob)]
    view[:] = blob
    _, back = unpack(give(view))
    for name, tensor in back.items():
        assert tensor.data_ptr() % 64 == 0, name
        assert same(tensors[name], tensor), name


def test_tensors_that_lie_aligned_are_views_of_the_blob(tensors):
    blob = pack(UNetForward(), tensors)
    memory = torch.empty(len(blob), dtype=torch.uint8)
    memory.numpy()[:] = blob
    _, back = unpack(memoryview(memory.numpy()))
    place = back["large"].data_ptr() - memory.data_ptr()
    assert 0 < place < len(blob)
    memory[place : place + 2] = 0
    assert back["large"].flatten()[0] == 0


def test_a_blob_fills_exactly_its_size(tensors):
    blob = Blob(UNetForward(), tensors)
    target = bytearray(b"\xa5" * (blob.size + 32))
    blob.write(memoryview(target))
    assert target[: blob.size] == pack(UNetForward(), tensors)
    assert set(target[blob.size :]) == {0xA5}


def test_channels_last_comes_back_with_its_strides():
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    _, back = unpack(pack(UNetForward(), {"x": x}))
    assert back["x"].stride() == x.stride()
    assert torch.equal(back["x"], x)


def test_another_writers_unaligned_tensors_are_read():
    told = json.dumps({"luna": json.dumps({"message": {}})})
    header = f'{{"__metadata__": {told}, "x": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}}}'.encode()
    header += b" " * (3 - len(header) % 4)
    blob = len(header).to_bytes(8, "little") + header + torch.tensor([1.5, -2.0]).numpy().tobytes()
    for given in (blob, bytearray(blob), memoryview(blob)):
        assert unpack(given)[1]["x"].tolist() == [1.5, -2.0]


def test_a_dtype_without_a_name_is_refused():
    with pytest.raises(Malformed, match="complex64"):
        pack(UNetForward(), {"x": torch.zeros(2, dtype=torch.complex64)})


def spelt(**entries):
    """A blob with these entries in its header and 16 bytes of data."""
    header = {"__metadata__": {"luna": json.dumps({"message": {}})}} | entries
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


WRONG = {
    "past the end": {"x": entry(shape=[5], offsets=[0, 20])},
    "before the beginning": {"x": entry(offsets=[-4, 12])},
    "reversed": {"x": entry(offsets=[16, 0])},
    "overlapping": {"x": entry(), "y": entry(offsets=[8, 16], shape=[2])},
    "the same bytes twice": {"x": entry(), "y": entry()},
    "a gap": {"x": entry(shape=[1], offsets=[0, 4]), "y": entry(shape=[2], offsets=[8, 16])},
    "data left over": {"x": entry(shape=[2], offsets=[0, 8])},
    "no tensors but data": {},
    "shape and bytes disagree": {"x": entry(shape=[3])},
    "unknown dtype": {"x": entry(dtype="F31")},
    "dtype of another type": {"x": entry(dtype=["F32"])},
    "negative sides": {"x": entry(shape=[-2, -2])},
    "fractional sides": {"x": entry(shape=[4.0])},
    "boolean sides": {"x": entry(shape=[True, 4])},
    "fractional offsets": {"x": entry(offsets=[0.0, 16.0])},
    "huge sides of nothing": {"x": entry(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0])},
    "too many dimensions": {"x": entry(shape=[1] * 17 + [4])},
    "no offsets": {"x": {"dtype": "F32", "shape": [4]}},
    "no object": {"x": [0, 16]},
}


@pytest.mark.parametrize("entries", WRONG.values(), ids=WRONG)
def test_every_bound_is_checked(entries):
    with pytest.raises(Malformed, match="not safetensors"):
        unpack(spelt(**entries))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"1234567",
        bytes(8),
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"\xff\xff{}",
        (5 << 20).to_bytes(8, "little") + b" " * (6 << 20),
        (40_000).to_bytes(8, "little") + b"[" * 40_000,
    ],
)
def test_what_is_no_blob_is_refused(blob):
    with pytest.raises(Malformed):
        unpack(blob)


def test_cut_short_at_any_byte_it_is_refused():
    blob = pack(UNetForward(), {"x": torch.ones(3), "y": torch.ones(2, dtype=torch.float16)})
    for length in range(len(blob)):
        with pytest.raises(Malformed):
            unpack(blob[:length])


def test_set_hash_follows_names_and_content():
    one, two = torch.ones(2), torch.zeros(2)
    assert set_hash({"a": one, "b": two}) == set_hash({"b": two, "a": one})
    assert set_hash({"a": one, "b": two}) != set_hash({"a": two, "b": one})


def test_a_message_too_large_for_a_header_travels_as_a_tensor(tensors):
    job = SaveJob(
        job_id="job-00001",
        groups=[PictureGroup(source="image", tensor="odd")],
        created=1,
        prompt={"1": '"\\日' * 900_000},
    )
    blob = pack(job, tensors)
    message, back = unpack(blob)
    assert message == job.model_dump(mode="json")
    assert back.keys() == tensors.keys() and all(same(tensors[name], back[name]) for name in tensors)
    assert load(bytes(blob)).keys() == tensors.keys() | {"luna.message"}
    with pytest.raises(TooLarge, match="bytes of JSON"):
        pack(job.model_copy(update={"prompt": "p" * (32 << 20)}), {})


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"m": torch.zeros(4)},
        {"m": torch.tensor(list(b"[1]"), dtype=torch.uint8)},
        {"m": torch.tensor(list(b'{"a":'), dtype=torch.uint8)},
        {"m": torch.tensor(list(b"[" * 90_000), dtype=torch.uint8)},
        {"m": torch.tensor([0xFF, 0xFE, 0xFD], dtype=torch.uint8)},
    ],
    ids=["missing", "floats", "list", "half", "deep", "no text"],
)
def test_a_tensor_that_holds_no_message_is_malformed(held):
    with pytest.raises(Malformed, match="message"):
        unpack(save(held, metadata={"luna": json.dumps({"message": "m"})}))
