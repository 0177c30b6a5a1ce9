"""The weights of a checkpoint's parts: in which dtype, and how they get from the file into a module."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from handlers.engine.checkpoints import Part, read_header
from luna_protocol.alignment import aligned, is_aligned
from luna_protocol.errors import Malformed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MAPPINGS = 64  # of a file, one after the other


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

    The file is mapped, and each tensor goes straight to its place: on the CPU a tensor that is already of `dtype` and
    `aligned` stays in the mapping, shared by every process that serves the file. The others are copied, and for them
    the mapping is renewed now and then, so that what was read does not add up in this process.

    Raises:
        Malformed: the file is corrupt.
    """
    wanted = dict(part.keys(read_header(path), component))
    share = Path(path).stat().st_size // _MAPPINGS
    try:
        tensors = _mapped(path, wanted, dtype) if device.type == "cpu" else {}
        copied = [(key, short) for key, short in wanted.items() if short not in tensors]
        while copied:
            read = 0
            with safe_open(path, "pt", device=str(device)) as file:
                while copied and read <= share:
                    key, short = copied.pop(0)
                    tensor = file.get_tensor(key)
                    tensors[short] = aligned(tensor.to(dtype) if tensor.is_floating_point() else tensor)
                    read += tensor.nbytes
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


def _mapped(path: Path, wanted: dict[str, str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Those tensors that can be used where the file is mapped."""
    with safe_open(path, "pt") as file:
        views = {short: file.get_tensor(key) for key, short in wanted.items()}
    return {
        short: view
        for short, view in views.items()
        if is_aligned(view) and (view.dtype == dtype or not view.is_floating_point())
    }
