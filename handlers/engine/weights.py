"""The weights of a checkpoint's parts: in which dtype, and how they get from the file into a module."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from handlers.engine.checkpoints import Part, read_header
from luna_protocol.errors import Malformed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_REMAP_BYTES = 32 << 20


def compute_dtype(role: str, wanted: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `wanted`, or for "auto" what ComfyUI chooses: fp32 on a CPU and for text encoders
    everywhere (their sums are small and the pictures follow them closely), fp16 for a UNet on a GPU, bf16 for a VAE
    there (SDXL's overflows in fp16)."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cpu" or role == "clip":
        return torch.float32
    return torch.float16 if role == "unet" else torch.bfloat16


def read_tensors(
    path: Path, part: Part, component: str, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """One component's tensors on `device`, floating ones as `dtype`.

    The file is mapped, and each tensor goes straight to its place: on the CPU a tensor already of `dtype` stays in the
    mapping, shared by every process that serves the file. Where tensors are cast, the mapping is renewed now and then,
    so that what was read does not add up in this process.

    Raises:
        Malformed: the file is corrupt.
    """
    wanted = list(part.keys(read_header(path), component))
    tensors: dict[str, torch.Tensor] = {}
    try:
        while len(tensors) < len(wanted):
            read = 0
            with safe_open(path, "pt", device=str(device)) as file:
                for key, short in wanted[len(tensors) :]:
                    tensors[short] = _cast(file.get_tensor(key), dtype)
                    read += tensors[short].nbytes
                    if read > _REMAP_BYTES:
                        break
    except (SafetensorError, OSError) as error:
        raise Malformed(f"{Path(path).name} cannot be read: {error}", "is the file complete?") from error
    return tensors


def read_scalars(path: Path, names: Sequence[str]) -> dict[str, float]:
    """The values of tensors with at most one element; an empty one, which stands for itself, counts as 0."""
    with safe_open(path, "pt") as file:
        return {name: float(file.get_tensor(name).sum()) for name in names}


def adopt(module: torch.nn.Module, tensors: dict[str, torch.Tensor], what: str) -> torch.nn.Module:
    """Gives a module built on the meta device its weights, without a copy, and freezes it.

    Raises:
        Malformed: naming tensors that the file lacks, or has too many, or in another shape.
    """
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise Malformed(f"the {what} does not fit together: {str(error).splitlines()[-1].strip()}") from error
    if missing or unexpected:
        told = [f"lacks {', '.join(missing[:3])} ({len(missing)} in all)"] if missing else []
        told += [f"has unknown tensors {', '.join(unexpected[:3])} ({len(unexpected)} in all)"] if unexpected else []
        raise Malformed(f"the {what} {' and '.join(told)}", "is the file complete, and of a family that is served?")
    return module.eval().requires_grad_(False)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
