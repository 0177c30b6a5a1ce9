"""File names from templates, safe on every system: they stay under the output root whatever the template or its
values hold."""

import os
import re
import time
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from luna_protocol.errors import Malformed
from luna_protocol.save_job import MAX_TEMPLATE

DISCARDED = "_discarded"
# 255 is what file systems allow; the rest is room for affix, counter and extension.
MAX_NAME_BYTES = 180
MAX_PATH_BYTES = 1000
MAX_DEPTH = 16
# Of a path: for the folder of discarded pictures, and for the names that files have while they are written.
_ROOM_BESIDE_NAMES = 64
_SHORTEST = 8

_TIME_PARTS = {"YYYY": "%Y", "mm": "%m", "dd": "%d", "HH": "%H", "MM": "%M", "SS": "%S"}
_TIME = re.compile("|".join(_TIME_PARTS))
# What ComfyUI's frontend writes behind %date: in a filename_prefix; a single letter is a number without its zero.
_DATE_PARTS = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S"}
_DATE = re.compile("|".join((*_DATE_PARTS, "[Mdhms]")))
# Save Image's variables of the time.
_CLOCK = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}
_LIKE_A_VARIABLE = re.compile(r"%[A-Za-z_][^%/\\]*%")
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


def check_template(template: str) -> None:
    """Whether a template stays under the output folder.

    Raises:
        Malformed: it is an absolute path, has `..` for a folder, or is longer than `MAX_TEMPLATE`.
    """
    if len(template) > MAX_TEMPLATE:
        raise Malformed(f"{template[:40]!r}... has {len(template)} characters", f"use at most {MAX_TEMPLATE}")
    if re.match(r"\s*([/\\]|[A-Za-z]:[/\\])", template):
        raise Malformed(f"the path {template[:80]!r} is absolute", "give a path relative to the output folder")
    if any(part.strip() == ".." for part in re.split(r"[/\\]", template)):
        raise Malformed(f"the path {template[:80]!r} leaves the output folder", "leave out '..'")


def contained(template: str) -> str:
    """`template` without what `check_template` refuses."""
    parts = re.split(r"[/\\]", template[:MAX_TEMPLATE])
    return "/".join(part for part in parts if not re.fullmatch(r"\s*([A-Za-z]:|[.]*)\s*", part))


def render(template: str, variables: Mapping[str, object], created: float) -> PurePosixPath:
    """`template` with its variables filled in, as a relative path of at most `MAX_DEPTH` safe names ("." when nothing
    is left). What is no variable stays as it is; what leads out of the output folder is left out.

    Args:
        variables: values of %name%; what they hold is made safe.
        created: seconds since 1970, shown in local time by %time:FORMAT% (YYYY mm dd HH MM SS), %date:FORMAT% (yyyy MM
            dd hh mm ss), %year% %month% %day% %hour% %minute% %second%.
    """

    def fill(match: re.Match) -> str:
        clock, form, name = match.groups()
        if clock == "time":
            return _TIME.sub(lambda part: time.strftime(_TIME_PARTS[part[0]], moment), form or "YYYYmmddHHMMSS")
        if clock == "date":
            return _DATE.sub(lambda part: _of_date(part[0], moment), form or "yyyyMMdd")
        value = str(known[name])
        if name in _PATHS:
            return "/".join(safe_name(part) for part in re.split(r"[/\\]", value) if part.strip(". "))
        return safe_name(value)

    moment = time.localtime(created)
    known = {name: time.strftime(form, moment) for name, form in _CLOCK.items()} | dict(variables)
    filled = re.sub(rf"%(?:(time|date)(?::([^%]*))?|({'|'.join(known)}))%", fill, template)
    safe = [safe_name(piece) for piece in re.split(r"[/\\]", filled) if piece.strip().strip(".")]
    return PurePosixPath(*safe[: MAX_DEPTH - 1], *safe[MAX_DEPTH - 1 :][-1:])


def _of_date(part: str, moment: time.struct_time) -> str:
    return time.strftime(_DATE_PARTS[part], moment) if len(part) > 1 else str(int(_of_date(2 * part, moment)))


def unknown_variables(template: str, variables: Iterable[str]) -> list[str]:
    """What looks like a variable in `template`, and stays as it is."""
    known = "|".join((*variables, *_CLOCK, "time(:.*)?", "date(:.*)?"))
    return [found for found in _LIKE_A_VARIABLE.findall(template) if not re.fullmatch(f"%({known})%", found)]


def safe_name(text: str, size: int = MAX_NAME_BYTES) -> str:
    """One file or folder name that every system accepts: no separators, control or invisible characters, device names,
    leading dots, trailing dots or spaces of any kind; at most `size` bytes of UTF-8. Never empty."""
    text = "".join("_" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else c for c in text)
    text = unicodedata.normalize("NFC", text)
    text = _FORBIDDEN.sub("_", text).strip()
    if text.startswith("."):
        text = "_" + text[1:]
    if _DEVICE.match(text):
        text = "_" + text
    text = _cut(text, size)
    while text != (text := text.rstrip().rstrip(".")):
        pass
    return text or "_"


def room_below(root: Path) -> int:
    """Bytes that a path below `root` may have: Windows' 260 characters are for the whole of it."""
    return 258 - len(str(root)) if os.name == "nt" else MAX_PATH_BYTES


def fitted(names: Iterable[str], room: int) -> list[str]:
    """Safe names, the longest cut until there is room for them, and for what else a path of the queue needs."""
    names = list(names)
    room -= _ROOM_BESIDE_NAMES
    for size in range(MAX_NAME_BYTES, _SHORTEST, -1):
        if sum(min(len(name.encode()), size) + 1 for name in names) <= room:
            break
    return [safe_name(name, size) for name in names]


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


def picture_name(
    folder: PurePosixPath, stem: str, affix: str, row: int | None, extension: str, room: int = MAX_PATH_BYTES
) -> PurePosixPath:
    """`folder`/`stem`_`affix`_`row`.`extension`, without what is empty or None; folders and stem are cut so that the
    path has room."""
    tail = (f"_{safe_name(affix, 64)}" if affix else "") + (f"_{row:02d}" if row is not None else "")
    *folders, stem = fitted(
        [*folder.parts, safe_name(stem, MAX_NAME_BYTES - len(tail.encode()))], room - len(tail.encode())
    )
    return PurePosixPath(*folders, f"{stem}{tail}.{extension}")


def _cut(text: str, size: int) -> str:
    return text.encode()[:size].decode(errors="ignore")
