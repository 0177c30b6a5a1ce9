"""What the index says of the store's archives, at each poll of each client."""

import os
import zipfile
from pathlib import Path

import yaml

from handlers import repository


def write(archive: Path, role: str) -> None:
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("model-config.yaml", yaml.safe_dump({"handler": {"role": role, "home": "/home"}}))


def test_an_archive_is_read_when_it_has_changed_and_only_then(tmp_path: Path, monkeypatch) -> None:
    archive, opened = tmp_path / "a.unet.mar", []
    real = zipfile.ZipFile
    write(archive, "unet")
    monkeypatch.setattr(zipfile, "ZipFile", lambda *file: opened.append(file) or real(*file))
    assert [repository._settings(archive).role for _ in range(3)] == ["unet"] * 3
    assert len(opened) == 1
    monkeypatch.undo()
    write(archive, "vae")
    os.utime(archive, (1, 1))
    assert repository._settings(archive).role == "vae"
    archive.write_bytes(b"half an archive")
    assert repository._settings(archive) is None
    archive.unlink()
    assert repository._settings(archive) is None
