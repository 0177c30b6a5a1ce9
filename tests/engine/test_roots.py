import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.roots import Roots, confined, find
from luna_protocol.errors import LunaError, Malformed, NotFound
from serving.torchserve import TorchServe


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "C:\\x", "..\\x", "a\0b", "\\\\host\\x"])
def test_names_stay_below_their_root(tmp_path, name):
    with pytest.raises(Malformed, match="leads out"):
        confined(tmp_path / "root", name)


@given(st.text(max_size=40))
def test_any_name_is_confined_or_refused(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp() / "root"
    try:
        path = confined(root, name)
    except LunaError:
        return
    assert path.is_relative_to(root) and ".." not in path.parts


def test_roots_are_searched_in_order(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for root in (first, second):
        (root / "styles").mkdir(parents=True)
    (second / "styles" / "ink.safetensors").write_bytes(b"")
    assert find((first, second), "styles/ink.safetensors", "LoRA").parent.parent == second
    (first / "styles" / "ink.safetensors").write_bytes(b"")
    assert find((first, second), "styles\\ink.safetensors", "LoRA").parent.parent == first
    with pytest.raises(NotFound, match=r"no LoRA 'pen\.safetensors'"):
        find((first, second), "pen.safetensors", "LoRA")


def test_the_environment_overrides(tmp_path, monkeypatch):
    monkeypatch.setenv("LUNA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LUNA_LORAS", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
    monkeypatch.setenv("LUNA_OUTPUT", str(tmp_path / "pictures"))
    roots = Roots.from_environment(tmp_path / "ignored")
    assert roots.loras == (tmp_path / "a", tmp_path / "b")
    assert roots.output == tmp_path / "pictures"
    assert roots.checkpoints == (tmp_path / "home" / "models" / "checkpoints",)


def test_home_and_relative_folders_mean_the_same_to_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "me"))
    monkeypatch.setenv("LUNA_HOME", "~/luna")
    monkeypatch.setenv("LUNA_LORAS", f"loras{os.pathsep}~/more{os.pathsep}")
    monkeypatch.setenv("LUNA_RUN", "run")
    roots = Roots.from_environment(tmp_path / "ignored")
    assert roots.loras == (tmp_path / "loras", tmp_path / "me" / "more")
    assert roots.run == tmp_path / "run"
    assert roots.spool == tmp_path / "me" / "luna" / "spool"
    # TorchServe and its workers run in other folders.
    environment = TorchServe(tmp_path / "store", tmp_path / "run")._environment("scratch")
    monkeypatch.chdir("/")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Roots.from_environment(tmp_path / "ignored") == replace(roots, model_store=tmp_path / "store")
