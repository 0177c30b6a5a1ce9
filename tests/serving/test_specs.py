import shutil
from pathlib import Path

import pytest

from engine.settings import SETTINGS
from serving.specs import FOLDER, SpecError, load_spec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "specs"))


def change(folder: Path, old: str, new: str) -> None:
    path = folder / "unet.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("role", SETTINGS)
def test_the_specs_that_come_along_are_valid(role: str) -> None:
    config = load_spec(role).model_config_yaml(0)
    assert config["maxBatchDelay"] >= 1
    assert config["responseTimeout"] and config["startupTimeout"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("\nworkers: 1", "\nwokers: 1", ("unknown key 'wokers'", "did you mean 'workers'", "replicas")),
        ("\nworkers: 1", "", ("'workers' is missing",)),
        ("  size: 4", "  sise: 4", ("unknown key 'batch.sise'", "did you mean 'size'")),
        ("delay_ms: 1", "delay_ms: 0", ("batch.delay_ms is 0", "greater than or equal to 1")),
        ("workers: 1", "workers: two", ("workers is 'two'", "integer")),
        ("dtype: auto", "dtype: fp15", ("handler.dtype is 'fp15'", "did you mean 'fp16'", "bf16")),
        ("tensor_cache_mb", "tensor_cache_gb", ("unknown key 'handler.tensor_cache_gb'", "'tensor_cache_mb'")),
        ("devices: [0]", "devices: gpu", ("devices is 'gpu'", "cpu, or GPU numbers")),
        ("devices: [0]", "devices: [0, 0]", ("without repeats",)),
        ("devices: [0]", "devices: []", ("GPU numbers",)),
        ("devices: [0]", "devices: [true]", ("GPU numbers",)),
        ("devices: [0]", "devices: [0", ("not YAML",)),
    ],
)
def test_a_wrong_key_or_value_names_itself_and_the_choices(folder: Path, old: str, new: str, told: tuple) -> None:
    change(folder, old, new)
    with pytest.raises(SpecError) as error:
        load_spec("unet", folder)
    assert "unet.yaml" in str(error.value)
    for part in told:
        assert part in str(error.value)


def test_every_fault_is_told_at_once(folder: Path) -> None:
    change(folder, "replicas: 1", "replicas: 0")
    change(folder, "delay_ms: 1", "delay_ms: -5")
    with pytest.raises(SpecError) as error:
        load_spec("unet", folder)
    assert len(str(error.value).splitlines()) == 2


def test_an_empty_or_missing_spec_is_told(folder: Path) -> None:
    (folder / "vae.yaml").write_text("")
    with pytest.raises(SpecError, match=r"vae\.yaml"):
        load_spec("vae", folder)
    (folder / "vae.yaml").unlink()
    with pytest.raises(SpecError, match="No such file"):
        load_spec("vae", folder)


@pytest.mark.parametrize(
    ("devices", "replicas", "dealt"),
    [
        ("[0, 1]", 1, [[0, 1]]),
        ("[0, 1]", 2, [[0], [1]]),
        ("[0, 1, 2]", 2, [[0, 2], [1]]),
        ("[3]", 2, [[3], [3]]),
    ],
)
def test_devices_are_dealt_out_among_replicas(folder: Path, devices: str, replicas: int, dealt: list) -> None:
    change(folder, "devices: [0]", f"devices: {devices}")
    change(folder, "replicas: 1", f"replicas: {replicas}")
    spec = load_spec("unet", folder)
    assert [spec.model_config_yaml(replica)["deviceIds"] for replica in range(replicas)] == dealt


def test_cpu_is_told_to_torchserve_as_such(folder: Path) -> None:
    change(folder, "devices: [0]", "devices: cpu")
    config = load_spec("unet", folder).model_config_yaml(0)
    assert config["deviceType"] == "cpu" and "deviceIds" not in config


def test_a_role_takes_its_own_settings_only(folder: Path) -> None:
    (folder / "vae.yaml").write_text((folder / "unet.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(SpecError, match=r"unknown key 'handler\.step_cache_mb'"):
        load_spec("vae", folder)
