"""The weights of a checkpoint's parts: in which dtype, and how they get from the file into a module."""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoints import Part
from engine.layouts import some_of
from luna_protocol.alignment import aligned, is_aligned
from luna_protocol.errors import Broken, Malformed

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MAPPINGS = 64  # of a file, one after the other


class Weights:
    """A model's parameters, which can leave their device and come back: to page-locked host memory from a GPU, and on a
    CPU to the file that they were read from. Whoever holds a parameter goes on holding it.

    Args:
        model: has them all.
        read: the same model, read from its file once more.

    Attributes:
        kept: is held by who computes with them beside the compute thread; they stay meanwhile.
    """

    def __init__(self, model: torch.nn.Module | None = None, read: Callable[[], torch.nn.Module] | None = None):
        self._parameters = dict(model.named_parameters()) if model else {}
        self._read = read
        self._parked: dict[str, torch.Tensor] | None = None
        self.kept = threading.Lock()
        self.nbytes = sum(parameter.nbytes for parameter in self._parameters.values())

    @property
    def resident(self) -> bool:
        return self._parked is None

    @torch.inference_mode(False)
    @torch.no_grad()
    def park(self) -> None:
        """Frees the device."""
        if not self.resident:
            return
        self._parked = {}
        for name, parameter in self._parameters.items():
            if parameter.is_cuda:
                self._parked[name] = torch.empty_like(parameter, device="cpu", pin_memory=True).copy_(parameter)
            parameter.data = parameter.data.new_empty(0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unpark(self, device: torch.device) -> None:
        """Brings the weights back, the same bits."""
        if self.resident:
            return
        waiting = self._parked or dict(self._read().named_parameters())
        for name, parameter in self._parameters.items():
            parameter.data = waiting[name].data.to(device, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # before the page-locked copies go
        self._parked = None


def compute_dtype(role: str, wanted: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `wanted`, or for "auto" what ComfyUI chooses: fp32 on a CPU and for text encoders
    everywhere (their sums are small and the pictures follow them closely), fp16 for a UNet on a GPU, bf16 for a VAE
    there (SDXL's overflows in fp16)."""
    if wanted in DTYPES:
        return DTYPES[wanted]
    if wanted != "auto":
        raise Broken(f"weights in {wanted} need a ComfyUI", "give one with serve.py --comfyui, or pack another dtype")
    if device.type == "cpu" or role == "clip":
        return torch.float32
    return torch.float16 if role == "unet" else torch.bfloat16


def read_tensors(
    path: Path, part: Part, component: str, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """{name in the original layout: tensor} of one component on `device`, floating ones as `dtype`.

    The file is mapped, and each tensor goes straight to its place: on the CPU a tensor that is already of `dtype` and
    `aligned` stays in the mapping, shared by every process that serves the file. The others are copied, and for them
    the mapping is renewed now and then, so that what was read does not add up in this process.

    Raises:
        Malformed: the file is corrupt.
    """
    wanted = part.names[component]
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


def read_markers(path: Path, names: Mapping[str, str]) -> dict[str, float]:
    """The values of markers, given {marker: its name in the file}; of those that are no single number, which stand for
    themselves, 0."""
    with safe_open(path, "pt") as file:
        tensors = {marker: file.get_tensor(name) for marker, name in names.items()}
    return {marker: float(tensor) if tensor.numel() == 1 else 0.0 for marker, tensor in tensors.items()}


def adopt(module: torch.nn.Module, tensors: dict[str, torch.Tensor], what: str) -> torch.nn.Module:
    """Gives a module built on the meta device its weights, without a copy, and freezes it. What it has no place for is
    left out and named in the log, as by ComfyUI.

    Raises:
        Malformed: naming tensors that the file lacks, or has in another shape.
    """
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise Malformed(f"the {what} does not fit together: {str(error).splitlines()[-1].strip()}") from error
    if missing:
        raise Malformed(
            f"the {what} lacks {', '.join(missing[:3])} ({len(missing)} in all)",
            "is the file complete, and of a family that is served?",
        )
    if unexpected:
        log.warning("the %s has no place for %s", what, some_of(unexpected))
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
