"""Single-file checkpoints: which family and parts a safetensors file holds, from its header alone.

The one place for a further family is `_family` and the tables of `layouts.py`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from engine.layouts import Names, encoder_names, marker_names, unet_names, vae_names
from engine.unet_layout import Shapes, UNetLayout
from luna_protocol.errors import Impossible, Malformed, NotFound

MAX_HEADER_BYTES = 100 << 20  # safetensors' own bound
_SD2_CONTEXT = 1024  # also of its unCLIP models, which have vector conditioning as SDXL has


@dataclass(frozen=True)
class Part:
    """One servable part of a file.

    names: {component ("unet", "vae", "clip_l", "clip_g"): {name in the file: name in the original layout}}.
    """

    role: str
    names: dict[str, Names]


@dataclass(frozen=True)
class Detected:
    """What a file holds. `family` is "sd15" or "sdxl", or None for a lone VAE, which fits both."""

    family: str | None
    parts: dict[str, Part]

    def unused(self, header: Shapes) -> list[str]:
        """The names of tensors that belong to no part; not of markers, nor of what nearly every file has."""
        used = {key for part in self.parts.values() for names in part.names.values() for key in names}
        used |= set(marker_names(header).values())
        return sorted(key for key in header.keys() - used if not key.endswith(("position_ids", "logit_scale")))


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
            if start[:4] == b"GGUF":
                raise Malformed(f"{path.name} is a GGUF file", "serve the model's .safetensors file")
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
        Malformed, Impossible: nothing in it can be served, or not as ComfyUI would; the message says why.
    """
    found = {"unet": {"unet": unet_names(header)}, "clip": encoder_names(header), "vae": {"vae": vae_names(header)}}
    parts = {role: Part(role, names) for role, names in found.items() if names and all(names.values())}
    if not parts:
        some = ", ".join(sorted(header)[:3])
        raise Malformed(
            f"found neither UNet, text encoder nor VAE among {len(header)} tensors ({some} ...)",
            "SD1.5 and SDXL files in the original (LDM, ComfyUI) or diffusers' layout can be served",
        )
    return Detected(_family(header, parts), parts)


def part_shapes(header: Shapes, part: Part, component: str) -> dict[str, tuple[int, ...]]:
    """{name in the original layout: shape} of one component."""
    return {name: header[key] for key, name in part.names[component].items()}


def weights_size(path: Path, role: str, itemsize: int) -> int:
    """Bytes that one part of a file takes with `itemsize` bytes a weight, from its header.

    Raises:
        NotFound, Malformed: see `read_header` and `detect`; also when the file has no such part.
    """
    header = read_header(path)
    part = detect(header).parts.get(role)
    if part is None:
        raise Malformed(f"{Path(path).name} has no {role}", "pack it again with scripts/add_checkpoint.py")
    return sum(math.prod(header[key]) for names in part.names.values() for key in names) * itemsize


def _family(header: Shapes, parts: dict[str, Part]) -> str | None:
    if "unet" in parts:
        layout = UNetLayout.from_shapes(part_shapes(header, parts["unet"], "unet"))
        families = {(False, False): "sd15", (True, True): "sdxl"}
        family = families.get((layout.use_linear, layout.adm_channels is not None))
        if family is None or layout.context_dim == _SD2_CONTEXT:
            raise Impossible(
                f"a UNet with context width {layout.context_dim}, {'linear' if layout.use_linear else 'convolutional'} "
                f"projections and {'a' if layout.adm_channels else 'no'} vector conditioning is of no known family",
                "SD1.5 and SDXL can be served",
            )
        return family
    if "clip" in parts:
        return "sdxl" if "clip_g" in parts["clip"].names else "sd15"
    return None
