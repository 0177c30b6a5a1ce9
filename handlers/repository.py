"""Answers what the store holds, what is loaded, and what a model is made of, like Triton's repository index; and what
the decode queue holds, which outlives the workers that fill and empty it."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path

import yaml
from pydantic import ValidationError

from handlers.engine.checkpoints import detect, part_shapes, read_header
from handlers.engine.layouts import marker_names
from handlers.engine.roots import Roots, find, names_below
from handlers.engine.weights import read_markers
from handlers.queue_requests import QUEUE_REQUESTS, answer, open_queue
from handlers.role_handler import Item, Reply, RoleHandler
from handlers.settings import HandlerSettings
from handlers.worker_state import is_replaced, live_workers, mark_replaced
from luna_protocol.errors import LunaError, NotFound
from luna_protocol.messages import (
    DescribeModel,
    Index,
    Message,
    ModelDescription,
    Ready,
    ReplaceModel,
    RepositoryIndex,
    ServedModel,
    Worker,
)
from luna_protocol.model_names import archive_name, with_version, without_first


class RepositoryHandler(RoleHandler):
    accepts = (RepositoryIndex, DescribeModel, ReplaceModel, *QUEUE_REQUESTS)

    def load(self) -> None:
        self.queue = open_queue(self.settings)

    def run(self, items: list[Item]) -> list[Reply]:
        if isinstance(items[0].request, QUEUE_REQUESTS):
            return [Reply(answer(self.queue, item.request), {}) for item in items]
        # The server is the parent of every worker, this one included.
        workers = live_workers(self.settings.roots.run, os.getppid())
        answers = {RepositoryIndex: self._index, DescribeModel: self._describe, ReplaceModel: self._replace}
        return [Reply(answers[type(item.request)](item.request, workers), {}) for item in items]

    def _index(self, _request: RepositoryIndex, workers: dict[str, list[Worker]]) -> Message:
        roots = self.settings.roots
        found = {path.stem: _settings(path) for path in sorted(roots.model_store.glob("*.mar"))}
        archives = {stem: settings for stem, settings in found.items() if settings}
        packed = {settings.checkpoint for settings in archives.values()}
        loras = names_below(roots.loras)
        marks = {name: _fingerprint(partial(find, roots.loras, name, "LoRA")) for name in loras}
        unpacked = (name for name in names_below(roots.checkpoints) if name not in packed)
        return Index(
            models=[
                _served(_shown(stem, archives), settings, roots.run, workers) for stem, settings in archives.items()
            ],
            loras=loras,
            lora_fingerprints={name: mark for name, mark in marks.items() if mark},
            embeddings=names_below(roots.embeddings),
            servable=[name for name in unpacked if _is_servable(name, roots)],
        )

    def _stored(self, model: str) -> HandlerSettings:
        archive = self.settings.roots.model_store / archive_name(model)
        settings = _settings(archive) if archive.parent == self.settings.roots.model_store else None
        if settings is None:
            raise NotFound(f"the store has no model {model!r}", "the repository's index lists what it has")
        return settings

    def _replace(self, request: ReplaceModel, _workers: dict[str, list[Worker]]) -> Message:
        self._stored(request.model)
        mark_replaced(self.settings.roots.run, request.model, not request.done)
        return Ready()

    def _describe(self, request: DescribeModel, workers: dict[str, list[Worker]]) -> Message:
        settings = self._stored(request.model)
        path = settings.checkpoint_path()
        header = read_header(path)
        part = detect(header).parts[settings.role]
        return ModelDescription(
            model=_served(request.model, settings, self.settings.roots.run, workers),
            shapes={component: part_shapes(header, part, component) for component in part.names},
            markers=read_markers(path, marker_names(header)),
        )


def _is_servable(name: str, roots: Roots) -> bool:
    try:
        path = find(roots.checkpoints, name, "checkpoint")
        about = path.stat()
    except (LunaError, OSError):  # it is gone by now
        return False
    return _holds_parts(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=4096)
def _holds_parts(path: Path, _size: int, _modified: int) -> bool:
    try:
        return bool(detect(read_header(path)).parts)
    except LunaError:
        return False


def _shown(stem: str, archives: Mapping[str, HandlerSettings]) -> str:
    """A model's name as clients may use it: with its version once there are several, as any may be the default."""
    name = stem.partition("@")[0]
    several = any(other.startswith(f"{name}@") for other in archives)
    return with_version(stem.replace("@", "/")) if several else name


def _settings(archive: Path) -> HandlerSettings | None:
    """None for a file that is no archive of ours, or is being written just now."""
    try:
        about = archive.stat()
        return _read_settings(archive, about.st_mtime_ns, about.st_size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _read_settings(archive: Path, _modified: int, _size: int) -> HandlerSettings | None:
    try:
        with zipfile.ZipFile(archive) as content:
            settings = yaml.safe_load(content.read("model-config.yaml"))["handler"]
        shared = {name: settings[name] for name in HandlerSettings.model_fields if name in settings}
        return HandlerSettings.model_validate(shared)
    except (zipfile.BadZipFile, KeyError, TypeError, ValidationError, yaml.YAMLError):
        return None


def _served(name: str, settings: HandlerSettings, run: Path, workers: dict[str, list[Worker]]) -> ServedModel:
    return ServedModel(
        name=name,
        role=settings.role,
        family=settings.family,
        checkpoint=settings.checkpoint,
        fingerprint=_fingerprint(settings.checkpoint_path),
        replacing=is_replaced(run, name),
        workers=workers.get(without_first(name), []),
    )


def _fingerprint(find_file: Callable[[], Path]) -> str | None:
    try:
        path = find_file()
        about = path.stat()
    except (NotFound, OSError):
        return None
    identity = f"{path} {about.st_ino} {about.st_size} {about.st_mtime_ns}"
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
