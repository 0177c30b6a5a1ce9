import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints import detect, read_header
from engine.unet import UNet
from engine.weights import read_tensors
from luna_protocol.errors import Impossible, Malformed, NotFound
from tests import checkpoints
from tests.engine.conftest import CPU


@pytest.mark.parametrize(
    ("shape", "family", "encoders"),
    [
        ("tiny_sd15", "sd15", ["clip_l"]),
        ("tiny_sd15_inpaint", "sd15", ["clip_l"]),
        ("tiny_sdxl", "sdxl", ["clip_g", "clip_l"]),
    ],
)
def test_full_checkpoints(tiny, shape, family, encoders):
    found = detect(read_header(tiny(shape)[0]))
    assert found.family == family
    assert sorted(found.parts) == ["clip", "unet", "vae"]
    assert sorted(found.parts["clip"].names) == encoders


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_unet_only(tiny, tmp_path, prefix):
    tensors = load_file(tiny("tiny_sd15")[0])
    own = "model.diffusion_model."
    save_file({prefix + k[len(own) :]: v for k, v in tensors.items() if k.startswith(own)}, tmp_path / "u.safetensors")
    found = detect(read_header(tmp_path / "u.safetensors"))
    assert (found.family, list(found.parts)) == ("sd15", ["unet"])
    UNet.load(tmp_path / "u.safetensors", found.parts["unet"], torch.float32, CPU)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_vae_only(tiny, tmp_path, prefix):
    tensors = load_file(tiny("tiny_sd15")[0])
    own = "first_stage_model."
    save_file({prefix + k[len(own) :]: v for k, v in tensors.items() if k.startswith(own)}, tmp_path / "v.safetensors")
    found = detect(read_header(tmp_path / "v.safetensors"))
    assert (found.family, list(found.parts)) == (None, ["vae"])


def test_text_encoder_only(tiny, tmp_path):
    own = "cond_stage_model.transformer."
    tensors = load_file(tiny("tiny_sd15")[0])
    save_file({k[len(own) :]: v for k, v in tensors.items() if k.startswith(own)}, tmp_path / "t.safetensors")
    found = detect(read_header(tmp_path / "t.safetensors"))
    assert (found.family, list(found.parts), list(found.parts["clip"].names)) == ("sd15", ["clip"], ["clip_l"])


def test_unknown_family(tiny, tmp_path):
    tensors = load_file(tiny("tiny_sd15")[0])
    tensors["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(128, 100)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(Impossible, match="no known family"):
        detect(read_header(tmp_path / "odd.safetensors"))


def test_nothing_to_serve(tmp_path):
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(Malformed, match=r"some\.weight"):
        detect(read_header(tmp_path / "other.safetensors"))


def test_no_such_file(tmp_path):
    with pytest.raises(NotFound):
        read_header(tmp_path / "absent.safetensors")


def test_pickles_are_refused_unread(tmp_path):
    for name, write in (
        ("zipped.ckpt", lambda p: zipfile.ZipFile(p, "w").writestr("archive/data.pkl", b"cos\nsystem\n")),
        ("old.pt", lambda p: p.write_bytes(b"\x80\x02}q\x00.")),
    ):
        write(tmp_path / name)
        with pytest.raises(Malformed, match="pickle"):
            read_header(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated(tiny, tmp_path, keep):
    whole = tiny("tiny_sd15")[0].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:keep])
    with pytest.raises(Malformed, match=r"cut off|header says|corrupt"):
        read_header(tmp_path / "cut.safetensors")


def test_corrupt_header(tmp_path):
    junk = b'{"a": {"dtype": "F32", "shape"'.ljust(64)
    (tmp_path / "junk.safetensors").write_bytes(len(junk).to_bytes(8, "little") + junk)
    with pytest.raises(Malformed, match="corrupt"):
        read_header(tmp_path / "junk.safetensors")


def test_absurd_shape(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}).encode()
    (tmp_path / "huge.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(Malformed, match="header says"):
        read_header(tmp_path / "huge.safetensors")


def test_a_lacking_tensor_is_named(tiny, tmp_path):
    tensors = load_file(tiny("tiny_sd15")[0])
    del tensors["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(tensors, tmp_path / "lack.safetensors")
    path = tmp_path / "lack.safetensors"
    with pytest.raises(Malformed, match=r"lacks mid_block\.resnets\.0\.conv1\.weight"):
        UNet.load(path, detect(read_header(path)).parts["unet"], torch.float32, CPU)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_stored_dtypes_are_cast(tmp_path, stored):
    path = checkpoints.write(tmp_path / "stored.safetensors", "tiny_sd15")
    narrow = {k: v.to(stored) if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(narrow, path)
    part = detect(read_header(path)).parts["unet"]
    tensors = read_tensors(path, part, "unet", torch.float32, CPU)
    name = "input_blocks.0.0.weight"
    assert torch.equal(tensors[name], narrow["model.diffusion_model." + name].float())


@pytest.mark.parametrize("start", [b"\x80", b"\x80\x01", b"PK"])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path, start):
    length = int.from_bytes(start, "little")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + b"\0\0\0\0")
    assert path.read_bytes().startswith(start)
    assert read_header(path) == {"a": (1,)}
