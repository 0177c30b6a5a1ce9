"""Answers what the store holds, what is loaded, and what a model is made of, like Triton's repository index."""

import hashlib
import os
import zipfile
from pathlib import Path

import yaml
from pydantic import ValidationError

from handlers.engine.checkpoints import detect, part_shapes, read_header, read_scalars
from handlers.role_handler import Item, Reply, RoleHandler
from handlers.settings import HandlerSettings, settings_of
from handlers.worker_state import live_workers
from protocol.errors import NotFound
from protocol.messages import (
    DescribeModel,
    Index,
    Message,
    ModelDescription,
    RepositoryIndex,
    ServedModel,
    Worker,
)

_MARKERS = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


class RepositoryHandler(RoleHandler):
    accepts = (RepositoryIndex, DescribeModel)

    def load(self) -> None:
        """Nothing to load: each answer is read afresh."""

    def run(self, items: list[Item]) -> list[Reply]:
        # The server is the parent of every worker, this one included.
        workers = live_workers(self.settings.roots.run, os.getppid())
        answers = {RepositoryIndex: self._index, DescribeModel: self._describe}
        return [Reply(answers[type(item.request)](item.request, workers), {}) for item in items]

    def _index(self, _request: RepositoryIndex, workers: dict[str, list[Worker]]) -> Message:
        roots = self.settings.roots
        archives = {path.stem: _settings(path) for path in sorted(roots.model_store.glob("*.mar"))}
        loras = sorted(
            path.relative_to(root).as_posix() for root in roots.loras for path in root.rglob("*.safetensors")
        )
        models = [_served(name, settings, workers) for name, settings in archives.items() if settings]
        return Index(models=models, loras=loras)

    def _describe(self, request: DescribeModel, workers: dict[str, list[Worker]]) -> Message:
        archive = self.settings.roots.model_store / f"{request.model}.mar"
        settings = _settings(archive) if archive.parent == self.settings.roots.model_store else None
        if settings is None:
            raise NotFound(f"the store has no model {request.model!r}", "the repository's index lists what it has")
        path = settings.checkpoint_path()
        header = read_header(path)
        part = detect(header).parts[settings.role]
        about = path.stat()
        identity = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode()
        return ModelDescription(
            model=_served(request.model, settings, workers),
            fingerprint=hashlib.blake2b(identity, digest_size=16).hexdigest(),
            shapes={component: part_shapes(header, part, component) for component in part.prefixes},
            markers=read_scalars(path, [name for name in _MARKERS if name in header]),
        )


def _settings(archive: Path) -> HandlerSettings | None:
    """None for a file that is no archive of ours, or is being written just now."""
    try:
        with zipfile.ZipFile(archive) as content:
            return settings_of(yaml.safe_load(content.read("model-config.yaml"))["handler"])
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValidationError, yaml.YAMLError):
        return None


def _served(name: str, settings: HandlerSettings, workers: dict[str, list[Worker]]) -> ServedModel:
    return ServedModel(
        name=name,
        role=settings.role,
        family=settings.family,
        checkpoint=settings.checkpoint,
        workers=workers.get(name, []),
    )
