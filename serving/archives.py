"""The archives of the model store: our code and a model-config.yaml each, never weights."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from handlers.engine.checkpoints import detect, read_header
from handlers.engine.roots import Roots
from handlers.settings import settings_of
from luna_protocol.errors import LunaError
from luna_protocol.model_names import FIRST_VERSION, archive_name, without_first
from serving.specs import FOLDER, load_spec

ROOT = Path(__file__).resolve().parent.parent
_HANDLERS = {
    "unet": "unet_forward.py",
    "clip": "clip_encode.py",
    "vae": "vae_decode_save.py",
    "repository": "repository.py",
}


@dataclass(frozen=True)
class Archive:
    """A .mar of the store.

    model: NAME, or NAME/VERSION for versions after the first. written: it had to be packed, and was not there already
    with the same content. handler: the settings that it has for its handler.
    """

    model: str
    path: Path
    written: bool
    handler: dict[str, Any]

    @property
    def checkpoint(self) -> Path | None:
        """The file that it serves, None where there is none."""
        with suppress(LunaError, ValidationError):  # its worker tells why it is not served
            return settings_of(self.handler).checkpoint_path()
        return None


def pack_repository(store: Path, home: Path = ROOT, specs: Path = FOLDER) -> list[Archive]:
    """Pack the archive of the `repository` model."""
    return _pack_role(store, "repository", "repository", {"home": str(home)}, specs)


def pack_checkpoint(
    file: Path,
    store: Path,
    name: str | None = None,
    dtype: str | None = None,
    home: Path = ROOT,
    specs: Path = FOLDER,
    version: str = FIRST_VERSION,
) -> list[Archive]:
    """Pack one archive per part of a checkpoint (UNet, text encoders, VAE) and replica; only the file's header is read.

    Args:
        name: what the models are called before the dot; by default the file's own name.
        dtype: "fp32", "fp16" or "bf16" instead of what the specs say.
        home: LunaServe's home, see `Roots`.
        specs: the folder of the specs.
        version: beside which others of the same name may be served; a number such as "2.0".

    Raises:
        LunaError: the file cannot be served; see `read_header` and `detect`.
        SpecError: a spec cannot be used.
    """
    file = file.resolve()
    detected = detect(read_header(file))
    roots = Roots.from_environment(home).checkpoints
    root = next((root.resolve() for root in roots if file.is_relative_to(root.resolve())), file.parent)
    name = model_name(name or file.stem)
    archives = []
    for role in detected.parts:
        handler = {
            "home": str(home.resolve()),
            "family": detected.family,
            "checkpoint": file.relative_to(root).as_posix(),
            "checkpoint_roots": [str(root)],
        }
        archives += _pack_role(
            store, f"{name}.{role}", role, handler | ({"dtype": dtype} if dtype else {}), specs, version
        )
    return archives


def refresh(store: Path) -> list[Archive]:
    """Pack our archives of the store again whose code is not that of today, with the settings that they have."""
    archives = []
    for path in sorted(store.glob("*.mar")):
        with suppress(zipfile.BadZipFile, KeyError, TypeError, yaml.YAMLError):  # not ours
            with zipfile.ZipFile(path) as packed:
                config = yaml.safe_load(packed.read("model-config.yaml"))
            model, _, version = path.stem.partition("@")
            archives.append(_pack(store, model, config["handler"]["role"], config, version or FIRST_VERSION))
    return archives


def model_name(name: str) -> str:
    """`name` with what TorchServe's archiver does not take in a model's name replaced by underscores."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip("_.-") or "model"


def _pack_role(
    store: Path, model: str, role: str, handler: dict, specs: Path, version: str = FIRST_VERSION
) -> list[Archive]:
    spec = load_spec(role, specs)
    settings = {"role": role} | spec.handler.model_dump() | handler
    models = [f"{model}.{replica}" if replica else model for replica in range(spec.replicas)]
    for path in store.glob(f"{model}.*.mar"):
        if path.stem.removeprefix(f"{model}.").isdecimal() and path.stem not in models:
            path.unlink()
    return [
        _pack(store, replica, role, spec.model_config_yaml(number) | {"handler": settings}, version)
        for number, replica in enumerate(models)
    ]


def _pack(store: Path, model: str, role: str, config: dict, version: str) -> Archive:
    store.mkdir(parents=True, exist_ok=True)
    served = without_first(f"{model}/{version}")
    archive = store / archive_name(served)
    with tempfile.TemporaryDirectory(prefix="lunaserve-pack-") as folder:
        temporary = Path(folder)
        code = temporary / "code"
        for package in ("luna_protocol", "luna_pictures", "handlers"):
            shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
        config_file = temporary / "model-config.yaml"
        config_file.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        handler = code / "handlers" / _HANDLERS[role]
        if _is_current(archive, code, config_file, handler):
            return Archive(served, archive, False, config["handler"])
        # A process of its own, because the archiver collects its files in a fixed place of the temporary folder.
        command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", model, "--version", version]
        command += [
            "--handler",
            handler,
            "--extra-files",
            code,
            "--config-file",
            config_file,
            "--export-path",
            temporary,
        ]
        environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"torch-model-archiver could not pack {model}:\n{done.stderr[-2000:]}")
        # Renamed in place, so that nobody ever sees half an archive.
        partial = archive.with_suffix(".part")
        shutil.copyfile(temporary / f"{model}.mar", partial)
        os.replace(partial, archive)
    return Archive(served, archive, True, config["handler"])


def _is_current(archive: Path, code: Path, config_file: Path, handler: Path) -> bool:
    """Whether the archive holds exactly these files."""
    wanted = {path.relative_to(code).as_posix(): path for path in code.rglob("*") if path.is_file()}
    wanted |= {config_file.name: config_file, handler.name: handler}
    try:
        with zipfile.ZipFile(archive) as packed:
            held = set(packed.namelist()) - {"MAR-INF/MANIFEST.json"}
            manifest = json.loads(packed.read("MAR-INF/MANIFEST.json"))
            same_handler = manifest["model"]["handler"] == handler.name
            return (
                same_handler and held == wanted.keys() and all(packed.read(n) == wanted[n].read_bytes() for n in held)
            )
    except (OSError, zipfile.BadZipFile, KeyError):
        return False
