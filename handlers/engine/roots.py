"""Where things live on disk, and the rule that names in requests never lead anywhere else."""

import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from handlers.engine.comfyui_folders import comfyui_folders
from luna_protocol.errors import Malformed, NotFound

MAX_NAME = 255  # bytes, of most file systems


@dataclass(frozen=True)
class Roots:
    """The folders LunaServe reads and writes.

    checkpoints, loras and embeddings are searched in order; output takes saved pictures, spool the accepted decode
    jobs, run the state of running servers, model_store the archives.
    """

    checkpoints: tuple[Path, ...]
    loras: tuple[Path, ...]
    embeddings: tuple[Path, ...]
    output: Path
    spool: Path
    run: Path
    model_store: Path

    @classmethod
    def under(cls, home: Path) -> "Roots":
        """The folders of a LunaServe whose home is `home`."""
        home = Path(home).absolute()
        models = home / "models"
        return cls(
            checkpoints=(models / "checkpoints",),
            loras=(models / "loras",),
            embeddings=(models / "embeddings",),
            output=home / "output",
            spool=home / "spool",
            run=home / "run",
            model_store=home / "model_store",
        )

    @classmethod
    def from_environment(cls, home: Path) -> "Roots":
        """`under(LUNA_HOME or home)`, each folder replaced by its variable LUNA_CHECKPOINTS, LUNA_LORAS,
        LUNA_EMBEDDINGS (lists, separated as PATH is), LUNA_OUTPUT, LUNA_SPOOL, LUNA_RUN or LUNA_MODEL_STORE where that
        is set, and the model folders of the ComfyUI that LUNA_COMFYUI names added.

        Raises:
            NotFound, Malformed: see `comfyui_folders`.
        """
        roots = cls.under(Path(os.environ.get("LUNA_HOME") or home))
        changes: dict[str, object] = {}
        for field, default in vars(roots).items():
            value = os.environ.get(f"LUNA_{field.upper()}")
            if not value:
                continue
            several = isinstance(default, tuple)
            changes[field] = tuple(map(Path, value.split(os.pathsep))) if several else Path(value).absolute()
        roots = replace(roots, **changes)
        if comfyui := os.environ.get("LUNA_COMFYUI"):
            added = {kind: getattr(roots, kind) + paths for kind, paths in comfyui_folders(Path(comfyui)).items()}
            roots = replace(roots, **added)
        return roots


def confined(root: Path, name: str) -> Path:
    """The path of `name` (relative, with forward slashes) under `root`, symbolic links followed.

    Raises:
        Malformed: the name is absolute, leads out of the root, or could be no file's.
    """
    hint = "give a name below it, such as 'styles/ink.safetensors'"
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ":" in name or not name.isprintable():
        raise Malformed(f"{name[:80]!r} leads out of its folder, or is no file name", hint)
    if len(name.encode()) > MAX_NAME:
        raise Malformed(f"a name of {len(name.encode())} bytes: {name[:80]!r}", f"names have at most {MAX_NAME}")
    path = (Path(root) / relative).resolve()
    if not path.is_relative_to(Path(root).resolve()):
        raise Malformed(f"{name!r} leads out of its folder", hint)
    return path


def find(roots: tuple[Path, ...], name: str, what: str) -> Path:
    """The first file called `name` under one of `roots`.

    Raises:
        Malformed: the name leads out of a root.
        NotFound: no root has it.
    """
    paths = [confined(root, name) for root in roots]
    for path in paths:
        if path.is_file():
            return path
    places = ", ".join(map(str, roots)) or "no folder at all"
    raise NotFound(f"there is no {what} {name!r}", f"looked in {places}")
