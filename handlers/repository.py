"""Answers what the store holds and what is loaded, like Triton's repository index."""

import os
import zipfile
from pathlib import Path

import yaml

from handlers.role_handler import Item, Reply, RoleHandler
from handlers.worker_state import live_workers
from protocol.messages import Index, RepositoryIndex, ServedModel


class RepositoryHandler(RoleHandler):
    accepts = (RepositoryIndex,)

    def load(self) -> None:
        """Nothing to load: each answer is read afresh."""

    def run(self, items: list[Item]) -> list[Reply]:
        roots = self.settings.roots
        # The server is the parent of every worker, this one included.
        workers = live_workers(roots.run, os.getppid())
        models = [_describe(path, workers) for path in sorted(roots.model_store.glob("*.mar"))]
        loras = sorted(
            path.relative_to(root).as_posix() for root in roots.loras for path in root.rglob("*.safetensors")
        )
        return [Reply(Index(models=[model for model in models if model], loras=loras), {})]


def _describe(archive: Path, workers: dict) -> ServedModel | None:
    """None for a file that is no archive of ours, or is being written just now."""
    try:
        with zipfile.ZipFile(archive) as content:
            settings = yaml.safe_load(content.read("model-config.yaml"))["handler"]
        return ServedModel(
            name=archive.stem,
            role=settings["role"],
            family=settings.get("family"),
            checkpoint=settings.get("checkpoint"),
            workers=workers.get(archive.stem, []),
        )
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
