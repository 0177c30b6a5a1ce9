"""Single-file checkpoints: which family and parts a safetensors file holds, from its header alone.

The one place for a further family is `_family` and the part tables below it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from handlers.engine.unet_layout import Shapes, UNetLayout
from luna_protocol.errors import Impossible, Malformed, NotFound

MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound

_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_VAE_PREFIXES = ("first_stage_model.", "")
# {encoder: prefixes under which files keep it}; the tail shows that it is there. OpenCLIP-G has two spellings.
_CLIP_L = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "")
_CLIP_G_OPEN = "conditioner.embedders.1.model."
_CLIP_L_WIDTHS_END = 1280
_TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"


@dataclass(frozen=True)
class Part:
    """One servable part of a file: its tensors are those whose key starts with one of `prefixes`."""

    role: str
    prefixes: dict[str, str]

    def keys(self, header: Shapes, component: str) -> Iterator[tuple[str, str]]:
        """(key in the file, key without prefix) of one component ("unet", "vae", "clip_l", "clip_g")."""
        prefix = self.prefixes[component]
        return ((key, key[len(prefix) :]) for key in header if key.startswith(prefix))


@dataclass(frozen=True)
class Detected:
    """What a file holds. `family` is "sd15" or "sdxl", or None for a lone VAE, which fits both."""

    family: str | None
    parts: dict[str, Part]


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """{tensor's name: shape} of a safetensors file, none of its tensors read.

    Raises:
        NotFound: no such file.
        Malformed: not safetensors, or shorter than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"there is no file {path}", "give the path of a .safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        # A length may begin like a pickle or a zip archive; only a safetensors header begins with a brace behind it.
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES) or start[8:] != b"{":
            if start[:2] == b"PK" or start[:1] == b"\x80":
                raise Malformed(
                    f"{path.name} is a pickle checkpoint, which can run code when read", "convert it to .safetensors"
                )
            raise Malformed(f"{path.name} is not a safetensors file, or its header is cut off", "download it again")
        file.seek(8)
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise Malformed(f"the header of {path.name} is corrupt: {error}", "download it again") from error
    if end != size - 8 - length:
        raise Malformed(
            f"{path.name} has {size - 8 - length} bytes of tensors, its header says {end}", "download it again"
        )
    return shapes


def detect(header: Shapes) -> Detected:
    """Family and parts of a file with these tensors.

    Raises:
        Malformed: nothing in it can be served; the message says what was looked for.
    """
    parts = {part.role: part for part in (_unet(header), _clip(header), _vae(header)) if part}
    if not parts:
        some = ", ".join(sorted(header)[:3])
        raise Malformed(
            f"found neither UNet, text encoder nor VAE among {len(header)} tensors ({some} ...)",
            "SD1.5 and SDXL files in the original (LDM, ComfyUI) layout can be served",
        )
    return Detected(_family(header, parts), parts)


def part_shapes(header: Shapes, part: Part, component: str) -> dict[str, tuple[int, ...]]:
    """{key without prefix: shape} of one component."""
    return {short: header[key] for key, short in part.keys(header, component)}


def weights_size(path: Path, role: str, itemsize: int) -> int:
    """Bytes that one part of a file takes with `itemsize` bytes a weight, from its header.

    Raises:
        NotFound, Malformed: see `read_header` and `detect`; also when the file has no such part.
    """
    header = read_header(path)
    part = detect(header).parts.get(role)
    if part is None:
        raise Malformed(f"{Path(path).name} has no {role}", "pack it again with scripts/add_checkpoint.py")
    keys = (key for component in part.prefixes for key, _ in part.keys(header, component))
    return sum(math.prod(header[key]) for key in keys) * itemsize


def _prefix(header: Shapes, prefixes: tuple[str, ...], tail: str) -> str | None:
    return next((prefix for prefix in prefixes if prefix + tail in header), None)


def _unet(header: Shapes) -> Part | None:
    prefix = _prefix(header, _UNET_PREFIXES, "input_blocks.0.0.weight")
    return None if prefix is None else Part("unet", {"unet": prefix})


def _vae(header: Shapes) -> Part | None:
    for tail in ("decoder.conv_in.weight", "taesd_decoder.1.weight"):
        prefix = _prefix(header, _VAE_PREFIXES, tail)
        if prefix is not None:
            return Part("vae", {"vae": prefix})
    return None


def _clip(header: Shapes) -> Part | None:
    encoders = {}
    prefix = _prefix(header, _CLIP_L, _TOKEN_TABLE)
    if prefix is not None:
        narrow = header[prefix + _TOKEN_TABLE][1] < _CLIP_L_WIDTHS_END
        encoders["clip_l" if narrow else "clip_g"] = prefix
    if _CLIP_G_OPEN + "token_embedding.weight" in header:
        encoders["clip_g"] = _CLIP_G_OPEN
    return Part("clip", encoders) if encoders else None


def _family(header: Shapes, parts: dict[str, Part]) -> str | None:
    if "unet" in parts:
        layout = UNetLayout.from_shapes(part_shapes(header, parts["unet"], "unet"))
        families = {(False, False): "sd15", (True, True): "sdxl"}
        family = families.get((layout.use_linear, layout.adm_channels is not None))
        if family is None:
            raise Impossible(
                f"a UNet with context width {layout.context_dim}, {'linear' if layout.use_linear else 'convolutional'} "
                f"projections and {'a' if layout.adm_channels else 'no'} vector conditioning is of no known family",
                "SD1.5 and SDXL can be served",
            )
        return family
    if "clip" in parts:
        return "sdxl" if "clip_g" in parts["clip"].prefixes else "sd15"
    return None
