"""File names from templates, safe on every system: they stay under the output root whatever the template or its
values hold."""

import re
import time
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from luna_protocol.errors import Malformed

DISCARDED = "_discarded"
# 255 is what file systems allow; the rest is room for affix, counter and extension.
MAX_NAME_BYTES = 180
MAX_PATH_BYTES = 1000
MAX_DEPTH = 16

_VARIABLE = re.compile(r"%([a-z_]+)(?::([^%]*))?%")
_TIME_PARTS = {"YYYY": "%Y", "mm": "%m", "dd": "%d", "HH": "%H", "MM": "%M", "SS": "%S"}
_TIME = re.compile("|".join(_TIME_PARTS))
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)\s*(\.|$)", re.IGNORECASE)
# Variables whose value may name folders.
_PATHS = ("model_path", "model_dir")


def model_variables(model_path: str) -> dict[str, str]:
    """%model_name%, %model_path% and %model_dir% of a checkpoint's name, which may use either slash."""
    path = PurePosixPath(model_path.replace("\\", "/"))
    return {
        "model_name": path.stem,
        "model_path": str(path.with_suffix("")) if path.name else "",
        "model_dir": "" if path.parent == PurePosixPath(".") else str(path.parent),
    }


def render(template: str, variables: Mapping[str, object], created: float) -> PurePosixPath:
    """`template` with its variables filled in, as a relative path of safe names ("." when nothing is left).

    Args:
        variables: values of %name%; what they hold is made safe, never refused.
        created: seconds since 1970, shown by %time:FORMAT% in local time; FORMAT knows YYYY mm dd HH MM SS.

    Raises:
        Malformed: an unknown variable, an absolute path, `..`, or more than `MAX_DEPTH` folders.
    """

    def fill(match: re.Match) -> str:
        name, form = match.groups()
        if name == "time":
            moment = time.localtime(created)
            return _TIME.sub(lambda part: time.strftime(_TIME_PARTS[part[0]], moment), form or "YYYYmmddHHMMSS")
        if name not in variables:
            known = " ".join(f"%{known}%" for known in (*variables, "time:YYYY_mm_dd"))
            raise Malformed(f"the template {template!r} has an unknown variable {match[0]}", f"known are {known}")
        value = str(variables[name])
        if name in _PATHS:
            return "/".join(safe_name(part) for part in re.split(r"[/\\]", value) if part.strip(". "))
        return safe_name(value)

    if re.match(r"\s*([/\\]|[A-Za-z]:)", template):
        raise Malformed(f"the path {template!r} is absolute", "give a path relative to the output folder")
    parts = re.split(r"[/\\]", template)
    if any(part.strip() == ".." for part in parts):
        raise Malformed(f"the path {template!r} leaves the output folder", "leave out '..'")
    filled = [piece for part in parts for piece in _VARIABLE.sub(fill, part).split("/")]
    safe = [safe_name(piece) for piece in filled if piece.strip() not in ("", ".")]
    if len(safe) > MAX_DEPTH:
        raise Malformed(f"the path {template!r} has {len(safe)} folders", f"use at most {MAX_DEPTH}")
    return PurePosixPath(*safe)


def safe_name(text: str) -> str:
    """One file or folder name that every system accepts: no separators, control or invisible characters, device names,
    leading dots, trailing dots or spaces; at most `MAX_NAME_BYTES` of UTF-8. Never empty."""
    text = "".join("_" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else c for c in text)
    text = unicodedata.normalize("NFC", text)
    text = _FORBIDDEN.sub("_", text).strip()
    if text.startswith("."):
        text = "_" + text[1:]
    if _DEVICE.match(text):
        text = "_" + text
    text = _cut(text, MAX_NAME_BYTES).rstrip(". ")
    return text or "_"


def discarded(path: PurePosixPath) -> PurePosixPath:
    """Where a picture that the quality gate rejects goes; one that is there stays."""
    return path if path.parent.name == DISCARDED else path.parent / DISCARDED / path.name


def numbered(path: PurePosixPath, number: int) -> PurePosixPath:
    """`path`, told apart from files of the same name by `number`; 0 leaves it as it is."""
    return path if number == 0 else path.with_name(f"{path.stem}_{number:05d}{path.suffix}")


def name_key(path: PurePosixPath) -> str:
    """What is equal for two paths that some file system takes for one: case and Unicode form left aside."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", str(path)).casefold())


def inside(root: Path, path: PurePosixPath) -> Path:
    """`path` under `root`, which is resolved already; links in `path` are followed.

    Raises:
        Malformed: it leads out of the root, through a file, or is too long.
    """
    if len(str(path).encode()) > MAX_PATH_BYTES:
        raise Malformed(f"the path {str(path)[:80]!r}... is too long", f"use at most {MAX_PATH_BYTES} bytes")
    folder = (root / path.parent).resolve()
    if not folder.is_relative_to(root):
        raise Malformed(f"the folder {str(path.parent)!r} leads out of the output folder", "remove the link")
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise Malformed(f"{there.name!r} is a file, not a folder", "choose another save_path")
    return folder / path.name


def picture_name(folder: PurePosixPath, stem: str, affix: str, row: int | None, extension: str) -> PurePosixPath:
    """`folder`/`stem`_`affix`_`row`.`extension`, without what is empty or None; the stem is cut so that the name
    fits."""
    tail = (f"_{_cut(safe_name(affix), 64)}" if affix else "") + (f"_{row:02d}" if row is not None else "")
    return folder / f"{_cut(stem, MAX_NAME_BYTES - len(tail.encode()))}{tail}.{extension}"


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode(errors="ignore")
