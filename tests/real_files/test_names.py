"""Files called as people call them: each is served under its own name, and no two become one model."""

import os
import re
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from engine.roots import confined, find, names_below
from luna_protocol.errors import Impossible, Malformed, NotFound
from luna_protocol.messages import Index, ServedModel
from luna_protocol.model_names import role_of
from serving.archives import pack_checkpoint, refresh
from serving.names import model_name
from serving.selection import named
from tests import checkpoints

POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no such names, or no links without rights")
NAMES = [
    "动漫风格.safetensors",
    "写实风格.safetensors",
    "Реализм.safetensors",
    "リアル 絵.safetensors",
    "café.safetensors",
    "no\u00a0break\u3000wide.safetensors",
    "zero\u200dwidth.safetensors",
    "mix [fp16] (2).safetensors",
    "x" * 240 + ".safetensors",
]


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """As little as is taken for a VAE."""
    path = tmp_path_factory.mktemp("file") / "tiny.safetensors"
    tiny = replace(checkpoints.SHAPES["tiny_sd15"], vae=replace(checkpoints.TAESD, channels=4))
    tensors = checkpoints.state_dict(tiny)
    save_file({key: tensor for key, tensor in tensors.items() if key.startswith("first_stage_model.")}, path)
    return path


@pytest.fixture
def place(vae: Path, tmp_path: Path):
    """place(name) puts the VAE under this name into the checkpoint folder of the home."""

    def place(name: str, root: str = "models/checkpoints") -> Path:
        path = tmp_path / root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(vae, path)
        return path

    return place


def pack(file: Path, home: Path, **options) -> tuple[str, str]:
    """The model's name, and the name that people see."""
    [archive] = pack_checkpoint(file, home / "store", home=home, **options)
    assert archive.checkpoint == file
    return archive.model, archive.handler["checkpoint"]


def test_names_of_other_scripts_are_models_of_their_own_and_shown_as_they_are(place, tmp_path):
    packed = {name: pack(place(name), tmp_path) for name in NAMES}
    assert [shown for _, shown in packed.values()] == NAMES
    models = [model for model, _ in packed.values()]
    assert len(set(models)) == len(NAMES)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", model) for model in models)
    assert len(list((tmp_path / "store").iterdir())) == len(NAMES)
    # The same at the next start, and for the one who adds them again.
    assert [archive.model for archive in refresh(tmp_path / "store")] == sorted(models)
    assert [pack(tmp_path / "models" / "checkpoints" / name, tmp_path)[0] for name in NAMES] == models


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("sd_xl_base_1.0", "sd_xl_base_1.0"),
        ("my model (2)", "my_model__2_"),
        ("动漫 v2", "v2-d85cd131"),
        ("_ä", "model-03f57254"),
        ("...", "model-7456c252"),
    ],
)
def test_a_model_s_name_is_readable_and_never_changes(name, model):
    assert model_name(name) == model


def test_composed_and_decomposed_letters_are_two_files():
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    assert len({model_name(name) for name in names}) == 2


def test_one_stem_in_two_folders(place, tmp_path):
    first, second = place("anime/soft.safetensors"), place("photo/soft.safetensors")
    assert pack(first, tmp_path) == ("soft.vae", "anime/soft.safetensors")
    model, shown = pack(second, tmp_path)
    assert model.startswith("soft-") and shown == "photo/soft.safetensors"
    assert pack(first, tmp_path)[0] == "soft.vae"
    # It keeps its name when the first is gone, or it would be there twice.
    first.unlink()
    (tmp_path / "store" / "soft.vae.mar").unlink()
    assert pack(second, tmp_path)[0] == model


def test_a_file_that_moved_keeps_its_model(place, tmp_path):
    old = place("old/soft.safetensors")
    pack(old, tmp_path)
    new = place("new/soft.safetensors")
    old.unlink()
    assert pack(new, tmp_path) == ("soft.vae", "new/soft.safetensors")


def test_two_files_of_one_shown_name_are_refused_and_the_first_stays(place, tmp_path):
    first, second = place("soft.safetensors"), place("soft.safetensors", "elsewhere")
    pack(first, tmp_path)
    for name in (None, "other"):
        with pytest.raises(Impossible, match=r"soft\.vae serves another file of the name 'soft\.safetensors'"):
            pack(second, tmp_path, name=name)
    assert pack(first, tmp_path)[0] == "soft.vae"
    assert pack(second, tmp_path, version="2.0")[0] == "soft.vae/2.0"


def test_a_given_name_replaces_and_says_what(place, tmp_path):
    first, second = place("one.safetensors"), place("two.safetensors")
    for file, replaced in ((first, None), (first, None), (second, first)):
        [archive] = pack_checkpoint(file, tmp_path / "store", name="portrait", home=tmp_path)
        assert (archive.model, archive.replaced) == ("portrait.vae", replaced)


def test_an_archive_s_file_is_the_one_that_was_packed(place, tmp_path, monkeypatch):
    """A folder that is searched earlier may get a file of the same name at any time."""
    place("soft.safetensors", "first")
    file = place("soft.safetensors", "second")
    monkeypatch.setenv("LUNA_CHECKPOINTS", f"{tmp_path / 'first'}{os.pathsep}{tmp_path / 'second'}")
    assert pack(file, tmp_path) == ("soft.vae", "soft.safetensors")


@POSIX
def test_a_link_into_a_download_cache_goes_by_its_own_name(vae, tmp_path):
    blob = tmp_path / "cache" / "blobs" / ("0123456789abcdef" * 4)
    blob.parent.mkdir(parents=True)
    shutil.copy(vae, blob)
    link = tmp_path / "models" / "checkpoints" / "nice.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert pack(link, tmp_path) == ("nice.vae", "nice.safetensors")


@POSIX
def test_a_name_that_is_no_utf8_is_refused_by_name(vae, tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    shutil.copy(vae, file)
    with pytest.raises(Malformed, match="is not UTF-8"):
        pack(file, tmp_path)
    assert names_below((tmp_path,)) == []


@POSIX
def test_what_is_listed_is_found_links_included(tmp_path):
    root, elsewhere = tmp_path / "loras", tmp_path / "elsewhere"
    names = ["a: b.safetensors", "back\\slash.safetensors", "wide\u3000space.safetensors", "sub/deep.safetensors"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (elsewhere / "more").mkdir(parents=True)
    (elsewhere / "ink.safetensors").touch()
    (elsewhere / "more" / "pen.safetensors").touch()
    (root / "link.safetensors").symlink_to(elsewhere / "ink.safetensors")
    (root / "linked").symlink_to(elsewhere / "more", target_is_directory=True)
    (root / "broken.safetensors").symlink_to(elsewhere / "nothing")
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "folder.safetensors").mkdir()
    listed = names_below((root,))
    assert listed == sorted([*names, "link.safetensors", "linked/pen.safetensors"])
    assert [find((root,), name, "LoRA") for name in listed] == [root / name for name in listed]


def test_windows_separators_are_found_and_windows_drives_are_not(tmp_path):
    (tmp_path / "SDXL").mkdir()
    (tmp_path / "SDXL" / "x.safetensors").touch()
    assert find((tmp_path,), "SDXL\\x.safetensors", "checkpoint") == tmp_path / "SDXL" / "x.safetensors"
    for name in ("C:\\x.safetensors", "SDXL\\..\\..\\x", "\\\\host\\x"):
        with pytest.raises(Malformed, match="leads out"):
            confined(tmp_path, name)


def test_a_name_longer_than_any_file_s_is_refused_and_a_long_path_is_not_found(tmp_path):
    with pytest.raises(Malformed, match="a name of 312 bytes"):
        find((tmp_path,), "x" * 300 + ".safetensors", "LoRA")
    with pytest.raises(NotFound):
        find((tmp_path,), "/".join(["x" * 200] * 30), "LoRA")


def test_commands_take_a_model_a_checkpoint_or_a_file_and_no_other_of_the_same_beginning():
    def model(name: str, checkpoint: str) -> ServedModel:
        return ServedModel(name=name, role=role_of(name), checkpoint=checkpoint)

    index = Index(
        models=[
            model("realistic.unet", "realistic.safetensors"),
            model("realistic.vae", "realistic.safetensors"),
            model("realistic.v2.unet", "realistic.v2.safetensors"),
            model("soft.unet/1.0", "anime/soft.safetensors"),
            model("soft.unet/2.0", "anime/soft.safetensors"),
            model("soft-1a2b3c4d.unet", "photo/soft.safetensors"),
            model("v2-d85cd131.unet", "动漫 v2.safetensors"),
        ]
    )
    assert named(index, ["realistic"]) == ["realistic.unet", "realistic.vae"]
    assert named(index, ["realistic.v2"]) == ["realistic.v2.unet"]
    assert named(index, ["realistic.vae"]) == ["realistic.vae"]
    assert named(index, ["soft.unet"]) == ["soft.unet/1.0", "soft.unet/2.0"]
    assert named(index, ["soft"]) == ["soft.unet/1.0", "soft.unet/2.0"]
    assert named(index, ["soft.unet/2.0"]) == ["soft.unet/2.0"]
    assert named(index, ["photo\\soft.safetensors"]) == ["soft-1a2b3c4d.unet"]
    assert named(index, ["动漫 v2.safetensors"]) == named(index, ["动漫 v2"]) == ["v2-d85cd131.unet"]
    with pytest.raises(NotFound, match=r"could be anime/soft\.safetensors or photo/soft\.safetensors"):
        named(index, ["soft.safetensors"])
    for name in ("realisti", "unet", "", "."):
        with pytest.raises(NotFound, match="the store has no"):
            named(index, [name])
