"""Where things live on disk, and the rule that names in requests never lead anywhere else."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from engine.comfyui_folders import comfyui_folders
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
        roots = cls.under(_given(os.environ.get("LUNA_HOME") or str(home)))
        changes: dict[str, object] = {}
        for field, default in vars(roots).items():
            value = os.environ.get(f"LUNA_{field.upper()}")
            if not value:
                continue
            changes[field] = _several(value) if isinstance(default, tuple) else _given(value)
        roots = replace(roots, **changes)
        if comfyui := os.environ.get("LUNA_COMFYUI"):
            added = {kind: getattr(roots, kind) + paths for kind, paths in comfyui_folders(_given(comfyui)).items()}
            roots = replace(roots, **added)
        return roots


def absolute_environment() -> dict[str, str]:
    """The variables of folders that are set, with absolute paths, for processes that run elsewhere."""
    several = {f"LUNA_{field.upper()}": isinstance(each, tuple) for field, each in vars(Roots.under(Path())).items()}
    return {
        name: os.pathsep.join(map(str, _several(value))) if several.get(name) else str(_given(value))
        for name in ("LUNA_HOME", "LUNA_COMFYUI", *several)
        if (value := os.environ.get(name))
    }


def _several(paths: str) -> tuple[Path, ...]:
    return tuple(map(_given, filter(None, paths.split(os.pathsep))))


def _given(path: str) -> Path:
    """What a variable means to the process that reads it: "~" is the user's."""
    return Path(path).expanduser().absolute()


def confined(root: Path, name: str) -> Path:
    """The path of `name` (relative, with forward slashes) under `root`.

    Links below the root count as what they lead to: whoever may make one there could have put the file there.

    Raises:
        Malformed: the name is absolute, leads out of the root, or could be no file's.
    """
    hint = "give a name below it, such as 'styles/ink.safetensors'"
    separated = name.replace("\\", "/")
    drive = ":" in name if os.name == "nt" else re.match("[A-Za-z]:/", separated)
    if drive or separated.startswith("/") or ".." in separated.split("/") or "\0" in name:
        raise Malformed(f"{name[:80]!r} leads out of its folder, or is no file name", hint)
    relative = PurePosixPath(name)
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in relative.parts), default=0)
    if longest > MAX_NAME:
        raise Malformed(f"a name of {longest} bytes: {name[:80]!r}", f"names have at most {MAX_NAME}")
    return Path(root) / relative


def find(roots: tuple[Path, ...], name: str, what: str) -> Path:
    """The first file called `name` under one of `roots`; its separators may be those of Windows.

    Raises:
        Malformed: the name leads out of a root.
        NotFound: no root has it.
    """
    spellings = dict.fromkeys((name, name.replace("\\", "/")))  # elsewhere, a backslash may be part of a name
    for path in [confined(root, spelling) for spelling in spellings for root in roots]:
        with suppress(OSError):  # the whole path is too long for this system
            if path.is_file():
                return path
    places = ", ".join(map(str, roots)) or "no folder at all"
    raise NotFound(f"there is no {what} {name!r}", f"looked in {places}")


def names_below(roots: tuple[Path, ...]) -> list[str]:
    """The .safetensors files below the roots, links and linked folders included, by the names under which `find` has
    them. Broken links are left out, and names that are no UTF-8, as no request can carry them."""
    return sorted({name for root in roots for name in _names_below(root, set()) if _is_text(name)})


def _names_below(root: Path, above: set[Path]) -> Iterator[str]:
    real = root.resolve()
    if real in above:  # a link to a folder that it lies in
        return
    with suppress(OSError):
        for path in root.iterdir():
            if path.is_dir():
                yield from (f"{path.name}/{name}" for name in _names_below(path, above | {real}))
            elif path.suffix == ".safetensors" and path.is_file():
                yield path.name


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False
