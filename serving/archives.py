"""The archives of the model store: our code and a model-config.yaml each, never weights."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from engine.checkpoints import detect, read_header
from engine.layouts import some_of
from engine.roots import Roots
from engine.settings import settings_of
from handlers.engine_link import PACKAGES
from luna_protocol.errors import Impossible, Internal, LunaError, Malformed
from luna_protocol.model_names import FIRST_VERSION, archive_name, checkpoint_of, with_version, without_first
from serving.names import hashed_name, model_name
from serving.specs import FOLDER, load_spec

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
_HANDLERS = {"unet": "relay.py", "clip": "relay.py", "vae": "relay.py", "repository": "repository.py"}


@dataclass(frozen=True)
class Archive:
    """A .mar of the store.

    model: NAME, or NAME/VERSION for versions after the first. written: it had to be packed, and was not there already
    with the same content. handler: the settings that it has for its handler. replaced: another file, still there, that
    the model served until now.
    """

    model: str
    path: Path
    written: bool
    handler: dict[str, Any]
    replaced: Path | None = None

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
        name: what the models are called before the dot; by default after the file, see `serving/names.py`. A name that
            is given may be another file's, which it then replaces.
        dtype: "fp32", "fp16" or "bf16" instead of what the specs say.
        home: LunaServe's home, see `Roots`.
        specs: the folder of the specs.
        version: beside which others of the same name may be served; a number such as "2.0".

    Raises:
        LunaError: the file cannot be served; see `read_header`, `detect` and `try_parts`. Impossible: another file of
            the same name is served, and a ComfyUI could not tell the two apart.
        SpecError: a spec cannot be used.
    """
    from engine.trial import try_parts  # with torch and diffusers, which take seconds

    file = Path(os.path.abspath(file))
    header = read_header(file)
    detected = detect(header)
    try_parts(file, header, detected)
    if unused := detected.unused(header):
        log.warning("%s: not used are %s", file.name, some_of(unused))
    root, file = _root_of(file, Roots.from_environment(home).checkpoints)
    shown = file.relative_to(root).as_posix()
    try:
        shown.encode()
    except UnicodeEncodeError:
        raise Malformed(f"the file name {shown!r} is not UTF-8", "rename the file") from None
    stored = {archive.model: archive for archive in _stored(store)}
    name = model_name(name) if name else _free_name(file, shown, detected.parts, version, stored)
    _refuse_twins(file, shown, name, detected.parts, stored.values())
    archives = []
    for role in detected.parts:
        handler = {
            "home": str(home.resolve()),
            "family": detected.family,
            "checkpoint": shown,
            "checkpoint_roots": [str(root)],
        }
        archives += _pack_role(
            store, f"{name}.{role}", role, handler | ({"dtype": dtype} if dtype else {}), specs, version
        )
    before = {model: archive.checkpoint for model, archive in stored.items()}
    return [
        replace(archive, replaced=other) if (other := before.get(archive.model)) and not _same(other, file) else archive
        for archive in archives
    ]


def refresh(store: Path) -> list[Archive]:
    """Pack our archives of the store again whose code is not that of today, with the settings that they have."""
    archives = []
    for archive in _stored(store):
        model, _, version = with_version(archive.model).partition("/")
        archives.append(_pack(store, model, archive.handler["role"], _config(archive.path), version))
    return archives


def _stored(store: Path) -> Iterator[Archive]:
    """Our archives of the store; what else is there is left alone."""
    for path in sorted(store.glob("*.mar")):
        if config := _config(path):
            yield Archive(path.stem.replace("@", "/"), path, False, config["handler"])


def _config(archive: Path) -> dict[str, Any] | None:
    """Its model-config.yaml; None where it is no archive of ours."""
    with suppress(OSError, zipfile.BadZipFile, KeyError, TypeError, yaml.YAMLError):
        with zipfile.ZipFile(archive) as packed:
            config = yaml.safe_load(packed.read("model-config.yaml"))
        return config if config["handler"]["role"] in _HANDLERS else None


def _root_of(file: Path, roots: Iterable[Path]) -> tuple[Path, Path]:
    """The checkpoint folder that `file` lies under, and its path there; its own folder where that is none of them.

    A link goes by its own name: what it leads to, such as a download cache's file, often has none.
    """
    linked = file.parent.resolve() / file.name  # folders on the way may be links too
    for root in map(Path.absolute, roots):
        if file.is_relative_to(root):
            return root, file
        if linked.is_relative_to(root.resolve()):
            return root, root / linked.relative_to(root.resolve())
    return file.parent, file


def _free_name(file: Path, shown: str, roles: Iterable[str], version: str, stored: dict[str, Archive]) -> str:
    """After the file, with a hash of its path where that name is another file's."""

    def serves(name: str) -> list[Path]:
        models = (without_first(f"{name}.{role}/{version}") for role in roles)
        return [path for model in models if model in stored and (path := stored[model].checkpoint)]

    plain = model_name(file.stem)
    distinct = hashed_name(plain, shown)
    # What once needed the hash keeps it, or the file would be served twice.
    if any(_same(path, file) for path in serves(distinct)) or not all(_same(path, file) for path in serves(plain)):
        return distinct
    return plain


def _refuse_twins(file: Path, shown: str, name: str, roles: Iterable[str], stored: Iterable[Archive]) -> None:
    for archive in stored:
        same_name = archive.handler["role"] in roles and archive.handler.get("checkpoint") == shown
        if same_name and checkpoint_of(archive.model) != name:
            other = archive.checkpoint
            if other and not _same(other, file):
                raise Impossible(
                    f"{archive.model} serves another file of the name {shown!r} already: {other}",
                    "rename one of the two, or put it into a folder below one of the checkpoint folders",
                )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one file's: links to the same contents are different files here, as they have two names."""
    return one.name == other.name and one.parent.samefile(other.parent)


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
    try:
        return _packed(store, model, role, config, version)
    except OSError as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # one per file, in a list
        raise Internal(
            f"{model} could not be packed: {reason}", f"is there room in {store}, and where TMPDIR says?"
        ) from error


def _packed(store: Path, model: str, role: str, config: dict, version: str) -> Archive:
    store.mkdir(parents=True, exist_ok=True)
    served = without_first(f"{model}/{version}")
    archive = store / archive_name(served)
    with tempfile.TemporaryDirectory(prefix="lunaserve-pack-") as folder:
        temporary = Path(folder)
        code = temporary / "code"
        for package in PACKAGES:
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
            raise Internal(f"torch-model-archiver could not pack {model}:\n{done.stderr[-2000:]}")
        # Renamed in place, so that nobody ever sees half an archive.
        partial = archive.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            shutil.copyfile(temporary / f"{model}.mar", partial)
            os.replace(partial, archive)
        finally:
            partial.unlink(missing_ok=True)
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
