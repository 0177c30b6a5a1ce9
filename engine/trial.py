"""Whether a file's parts can be built, found out without reading a weight: what passes here loads in a worker."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoints import Detected, part_shapes
from engine.text_encoder import TextEncoder
from engine.unet import UNet
from engine.unet_layout import Shapes
from engine.vae import VAE
from luna_protocol.errors import LunaError, Malformed


def try_parts(path: Path, header: Shapes, detected: Detected) -> None:
    """Builds every part on the meta device.

    Raises:
        Malformed: the library cannot read the file, or tensors are missing or have other shapes.
    """
    try:
        with safe_open(path, "np"):  # which, other than "pt", reserves no memory
            pass
    except (SafetensorError, OSError) as error:
        raise Malformed(f"{path.name} cannot be read: {error}", "download it again") from error
    for part in detected.parts.values():
        for component in part.names:
            try:
                _build(component, part_shapes(header, part, component))
            except LunaError:
                raise
            except Exception as error:  # whatever the libraries' modules object to
                raise Malformed(f"the {component} of {path.name} cannot be built: {error}") from error


def _build(component: str, shapes: Shapes) -> None:
    # Single numbers are asked for their values.
    tensors = {
        name: torch.zeros(shape, device="cpu" if math.prod(shape) == 1 else "meta") for name, shape in shapes.items()
    }
    if component in ("clip_l", "clip_g"):
        TextEncoder.build(tensors, component)
    else:
        {"unet": UNet, "vae": VAE}[component].build(tensors)
