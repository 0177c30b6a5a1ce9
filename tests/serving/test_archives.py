import json
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from luna_protocol.errors import Malformed, NotFound
from serving.archives import pack_checkpoint, pack_repository, refresh
from serving.specs import FOLDER
from tests.checkpoints import write

LIMIT = 256 * 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("home") / "models" / "checkpoints" / "sub" / "tiny.safetensors", "tiny_sd15")


@pytest.fixture
def home(checkpoint: Path) -> Path:
    return checkpoint.parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def config_of(archive: Path) -> dict:
    with zipfile.ZipFile(archive) as packed:
        return yaml.safe_load(packed.read("model-config.yaml"))


def test_one_archive_per_part_that_names_the_checkpoint_below_its_root(checkpoint, home, store) -> None:
    archives = pack_checkpoint(checkpoint, store, home=home)
    assert {archive.model for archive in archives} == {"tiny.unet", "tiny.clip", "tiny.vae"}
    handler = config_of(store / "tiny.unet.mar")["handler"]
    assert handler["checkpoint"] == "sub/tiny.safetensors"
    assert handler["checkpoint_roots"] == [str(home / "models" / "checkpoints")]
    assert (handler["role"], handler["family"]) == ("unet", "sd15")


def test_an_archive_carries_our_code_and_nothing_else(checkpoint, home, store) -> None:
    pack_checkpoint(checkpoint, store, home=home)
    with zipfile.ZipFile(store / "tiny.vae.mar") as packed:
        names = packed.namelist()
    assert {"model-config.yaml", "relay.py", "luna_protocol/blob.py", "engine/vae.py"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"MAR-INF", "model-config.yaml", "relay.py", "luna_protocol", "luna_pictures", "engine", "handlers"}
    assert not [name for name in names if "__pycache__" in name]


def test_an_archive_stays_small_and_quick_whatever_the_checkpoint_weighs(tmp_path, store) -> None:
    small = write(tmp_path / "small.safetensors", "tiny_sdxl")
    with small.open("rb") as file:
        entries = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    weight = 40 << 30
    entries.pop("__metadata__", None)
    end = max(entry["data_offsets"][1] for entry in entries.values())
    entries["ballast"] = {"dtype": "U8", "shape": [weight], "data_offsets": [end, end + weight]}
    header = json.dumps(entries).encode()
    heavy = tmp_path / "heavy.safetensors"
    with heavy.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end + weight)  # sparse: it takes no room on the disk
    begun = time.monotonic()
    archives = pack_checkpoint(heavy, store)
    assert time.monotonic() - begun < 60
    assert [archive.model for archive in archives] == ["heavy.unet", "heavy.clip", "heavy.vae"]
    assert all(archive.path.stat().st_size < LIMIT for archive in archives)


def test_an_archive_is_packed_again_only_when_something_changed(checkpoint, home, store) -> None:
    assert all(archive.written for archive in pack_checkpoint(checkpoint, store, home=home))
    assert not any(archive.written for archive in pack_checkpoint(checkpoint, store, home=home))
    assert all(archive.written for archive in pack_checkpoint(checkpoint, store, home=home, dtype="fp32"))
    assert config_of(store / "tiny.unet.mar")["handler"]["dtype"] == "fp32"


def test_refresh_renews_the_code_and_keeps_the_settings(checkpoint, home, store) -> None:
    pack_repository(store, home)
    [archive, *_] = pack_checkpoint(checkpoint, store, home=home, dtype="bf16")
    outdated = store / "outdated.zip"
    with zipfile.ZipFile(archive.path) as packed, zipfile.ZipFile(outdated, "w") as old:
        for name in packed.namelist():
            old.writestr(name, b"raise SystemExit" if name == "luna_protocol/blob.py" else packed.read(name))
    outdated.replace(archive.path)
    assert [each.model for each in refresh(store) if each.written] == [archive.model]
    with zipfile.ZipFile(archive.path) as packed:
        assert b"def unpack" in packed.read("luna_protocol/blob.py")
    assert config_of(archive.path)["handler"]["dtype"] == "bf16"


def test_replicas_are_archives_of_their_own_and_go_when_the_spec_drops_them(checkpoint, home, store, tmp_path) -> None:
    specs = Path(shutil.copytree(FOLDER, tmp_path / "specs"))
    text = (specs / "unet.yaml").read_text().replace("replicas: 1", "replicas: 2").replace("[0]", "[0, 1]")
    (specs / "unet.yaml").write_text(text)
    pack_checkpoint(checkpoint, store, home=home, specs=specs)
    ids = [config_of(store / f"{model}.mar")["deviceIds"] for model in ("tiny.unet", "tiny.unet.1")]
    assert ids == [[0], [1]]
    pack_checkpoint(checkpoint, store, home=home)
    assert sorted(path.name for path in store.iterdir()) == ["tiny.clip.mar", "tiny.unet.mar", "tiny.vae.mar"]


def test_a_file_outside_the_roots_brings_its_folder_as_a_root(checkpoint, store, tmp_path) -> None:
    elsewhere = Path(shutil.copy(checkpoint, tmp_path / "elsewhere.safetensors"))
    pack_checkpoint(elsewhere, store)
    handler = config_of(store / "elsewhere.vae.mar")["handler"]
    assert (handler["checkpoint"], handler["checkpoint_roots"]) == ("elsewhere.safetensors", [str(tmp_path)])


def test_what_cannot_be_served_is_told_and_leaves_no_archive(store, tmp_path) -> None:
    with pytest.raises(NotFound):
        pack_checkpoint(tmp_path / "absent.safetensors", store)
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(Malformed, match="pickle"):
        pack_checkpoint(pickled, store)
    assert not store.exists()
