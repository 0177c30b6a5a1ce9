"""Several versions of one model under TorchServe, which has rules and a fault of its own about them."""

import json
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from luna_client.faults import DefaultVersion
from luna_protocol.model_names import archive_name
from serving.torchserve import Ports, TorchServe
from tests.conftest import connect


def pack_idle(archive: str | Path, store: Path, model: str, version: str) -> None:
    """A copy of an archive as a version of another model, which starts no worker."""
    with zipfile.ZipFile(archive) as packed:
        content = {name: packed.read(name) for name in packed.namelist()}
    manifest = json.loads(content["MAR-INF/MANIFEST.json"])
    manifest["model"] |= {"modelName": model, "modelVersion": version}
    config = yaml.safe_load(content["model-config.yaml"]) | {"minWorkers": 0, "maxWorkers": 0}
    content |= {"MAR-INF/MANIFEST.json": json.dumps(manifest), "model-config.yaml": yaml.safe_dump(config)}
    with zipfile.ZipFile(store / archive_name(f"{model}/{version}"), "w") as copy:
        for name, data in content.items():
            copy.writestr(name, data)


def test_versions_are_registered_at_once_and_unloaded_in_any_order(torchserve: TorchServe, tmp_path: Path) -> None:
    """A fresh TorchServe loses one of two that come together about every other time. It forgets no default version."""
    (tmp_path / "store").mkdir()
    repository = shutil.copy(torchserve.store / "repository.mar", tmp_path / "store")
    models = [f"{letter}.unet" for letter in "abcdef"]
    versions = [f"{model}/{version}" for model in models for version in ("1.0", "2.0")]
    for version in versions:
        pack_idle(repository, tmp_path / "store", *version.split("/"))
    with TorchServe(tmp_path / "store", tmp_path / "run", Ports.free()) as fresh:
        server = connect(fresh)
        together = threading.Barrier(len(versions))

        def register(version: str) -> bool:
            together.wait()
            return server.register(archive_name(version))

        with ThreadPoolExecutor(len(versions)) as pool:
            assert all(pool.map(register, versions))
        assert [server.versions(model)[0] for model in models] == [["1.0", "2.0"]] * len(models)

        server.register("repository.mar")
        server.wait_ready(["repository"])
        server.set_default("a.unet", "1.0")
        server.scale("a.unet/1.0", 1)
        with pytest.raises(DefaultVersion, match=r"a\.unet/1\.0 is the default .*set-default"):
            server.unregister("a.unet/1.0")
        server.unload("a.unet/1.0")
        assert server.versions("a.unet") == (["1.0", "2.0"], "1.0")
        assert server.describe("a.unet/1.0")["minWorkers"] == 0
        server.unload("a.unet/2.0")
        assert server.versions("a.unet") == (["1.0"], "1.0")

        # The plain name means the same again once all versions are back, in whatever order they come.
        server.set_default("b.unet", "2.0")
        for version in ("1.0", "2.0"):
            server.unload(f"b.unet/{version}")
        assert [server.register(archive_name(f"b.unet/{version}")) for version in ("1.0", "2.0")] == [True, False]
        assert server.versions("b.unet") == (["1.0", "2.0"], "2.0")
