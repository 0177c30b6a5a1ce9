"""Whoever has a ComfyUI has the folders already: the server finds them as ComfyUI does."""

from pathlib import Path

import pytest

from engine.comfyui_folders import comfyui_folders
from engine.roots import Roots
from luna_protocol.errors import Malformed, NotFound


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    for folder in ("models/checkpoints", "models/loras", "models/vae", "shared/ckpt", "shared/other", "shared/emb"):
        (tmp_path / "comfyui" / folder).mkdir(parents=True)
    return tmp_path / "comfyui"


def test_own_folders_come_first_and_extra_ones_follow(comfyui, monkeypatch):
    monkeypatch.setenv("SHARED_MODELS", str(comfyui / "shared"))
    (comfyui / "extra_model_paths.yaml").write_text(
        "a111:\n"
        "  base_path: $SHARED_MODELS\n"
        "  is_default: true\n"
        "  checkpoints: |\n"
        "    ckpt\n"
        "    other\n"
        "  embeddings: emb\n"
        "  loras: not_there\n"
        "empty:\n"
        "relative:\n"
        "  loras: shared/other\n"
    )
    folders = comfyui_folders(comfyui)
    shared, models = comfyui / "shared", comfyui / "models"
    assert folders == {
        "checkpoints": (models / "checkpoints", shared / "ckpt", shared / "other", models / "vae"),
        "loras": (models / "loras", shared / "other"),
        "embeddings": (shared / "emb",),
    }


def test_roots_take_them_from_the_environment(comfyui, tmp_path, monkeypatch):
    monkeypatch.setenv("LUNA_COMFYUI", str(comfyui))
    roots = Roots.from_environment(tmp_path / "home")
    assert roots.loras == (tmp_path / "home" / "models" / "loras", comfyui / "models" / "loras")
    assert comfyui / "models" / "vae" in roots.checkpoints
    assert roots.output == tmp_path / "home" / "output"


def test_a_folder_that_is_no_comfyui_is_told(tmp_path):
    with pytest.raises(NotFound, match="no folder models"):
        comfyui_folders(tmp_path)


@pytest.mark.parametrize("text", ["a: [", "- a\n- b", "a: 3", "\x00"])
def test_a_broken_yaml_is_told_with_its_path(comfyui, text):
    (comfyui / "extra_model_paths.yaml").write_text(text)
    with pytest.raises(Malformed, match=r"extra_model_paths\.yaml"):
        comfyui_folders(comfyui)
