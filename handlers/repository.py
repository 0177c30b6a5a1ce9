"""Answers what the store holds, what is loaded, and what a model is made of, like Triton's repository index; and what
the decode queue holds, which outlives the workers that fill and empty it."""

import hashlib
import logging
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from engine.checkpoints import detect, part_shapes, read_header
from engine.layouts import marker_names
from engine.replacements import is_replaced, mark_replaced
from engine.role import Reply
from engine.roots import Roots, find, names_below
from engine.saving.decode_queue import DecodeQueue
from engine.saving.queue_requests import QUEUE_REQUESTS, answer, open_queue
from engine.settings import HandlerSettings, settings_of
from engine.transport import Transport, encoded
from engine.weights import read_markers
from handlers.answers import body_of, quiet_logs, respond
from handlers.engine_link import served
from luna_protocol.answer import Answer
from luna_protocol.errors import Internal, LunaError, NotFound
from luna_protocol.messages import (
    DescribeModel,
    Index,
    Message,
    ModelDescription,
    Readiness,
    Ready,
    ReplaceModel,
    RepositoryIndex,
    ServedModel,
    Worker,
    parse_request,
)
from luna_protocol.model_names import archive_name, with_version, without_first

log = logging.getLogger(__name__)


class RepositoryHandler:
    """TorchServe's handler of the model `repository`, which needs no engine."""

    def initialize(self, context) -> None:
        quiet_logs()
        self.settings = settings_of(context.model_yaml_config["handler"])
        self._transport = Transport()
        self._requests = 0

    @cached_property
    def queue(self) -> DecodeQueue:
        return open_queue(self.settings)

    def handle(self, data: list[dict[str, Any]], context) -> list[bytes]:
        """One reply per row of `data`."""
        return [respond(self._answer(row), context, index) for index, row in enumerate(data)]

    def _answer(self, row: dict[str, Any]) -> Answer:
        body = body_of(row)
        self._requests += 1
        try:
            outcome = Reply(self._reply(body), {})
        except LunaError as error:
            outcome = error
        except Exception as error:
            log.exception("a request failed")
            outcome = Internal(f"{type(error).__name__}: {error}", "the server's log has the whole story")
        return encoded(outcome, body, self._transport)

    def _reply(self, body: Any) -> Message:
        message, _ = self._transport.receive(body)
        request = parse_request(message, (RepositoryIndex, DescribeModel, ReplaceModel, Readiness, *QUEUE_REQUESTS))
        match request:
            case RepositoryIndex():
                return self._index(self._workers())
            case DescribeModel():
                return self._describe(request, self._workers())
            case ReplaceModel():
                return self._replace(request)
            case Readiness():
                return Ready()
        return answer(self.queue, request)

    def _workers(self) -> dict[str, list[Worker]]:
        """{model: what each engine says of it}, and this process."""
        own = Worker(pid=os.getpid(), state="ready", device="cpu", requests=self._requests, last_used=time.time())
        return {"repository": [own]} | served(self.settings.roots.run)

    def _index(self, workers: dict[str, list[Worker]]) -> Message:
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

    def _replace(self, request: ReplaceModel) -> Message:
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
