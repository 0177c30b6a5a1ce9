"""The model folders of an existing ComfyUI: its own, and those that its extra_model_paths.yaml names."""

import os
from pathlib import Path

import yaml

from luna_protocol.errors import Malformed, NotFound

# What ComfyUI calls the folders that hold what we serve.
KINDS = {
    "checkpoints": ("checkpoints", "diffusion_models", "unet", "vae", "text_encoders", "clip"),
    "loras": ("loras",),
    "embeddings": ("embeddings",),
}


def comfyui_folders(directory: Path) -> dict[str, tuple[Path, ...]]:
    """{"checkpoints", "loras", "embeddings": existing folders, ComfyUI's own first}.

    Raises:
        NotFound: this is no folder of a ComfyUI.
        Malformed: its extra_model_paths.yaml cannot be read.
    """
    directory = Path(directory).absolute()
    if not (directory / "models").is_dir():
        raise NotFound(f"{directory} is no ComfyUI: it has no folder models", "give the folder that holds main.py")
    extra = _extra(directory / "extra_model_paths.yaml")
    found = {}
    for kind, names in KINDS.items():
        paths = [path for name in names for path in (directory / "models" / name, *extra.get(name, ()))]
        found[kind] = tuple(dict.fromkeys(path for path in paths if path.is_dir()))
    return found


def _extra(file: Path) -> dict[str, list[Path]]:
    """{folder's name: paths}. Sections may have a base_path; a value may hold several paths, one a line."""
    if not file.is_file():
        return {}
    hint = "ComfyUI's extra_model_paths.yaml.example shows its form"
    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Malformed(f"{file} is not YAML: {error}", hint) from error
    if not isinstance(sections, dict) or not all(isinstance(each, dict) for each in sections.values() if each):
        raise Malformed(f"{file} holds no sections of named paths", hint)
    found: dict[str, list[Path]] = {}
    for section in filter(None, sections.values()):
        base = file.parent / _expanded(str(section.get("base_path") or ""))
        for name, value in section.items():
            if name not in ("base_path", "is_default"):
                lines = filter(None, map(str.strip, str(value or "").splitlines()))
                found.setdefault(name, []).extend(base / _expanded(line) for line in lines)
    return found


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()
