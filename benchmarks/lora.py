"""What LoRAs cost a step: merged overlays against the forward without LoRA, the origin's way, the side path and, with
COMFYUI_DIR (and COMFYUI_PYTHON), ComfyUI's own patching of the same file.

On the miniature, and unless --quick on a full-width SD1.5 UNet with random weights; the JSON line has the larger of
the two that ran. Both in fp32: few processors multiply bf16, and the others take four times as long for it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks._bench import arguments, conclude, in_turns, scratch_home, show
from benchmarks.overhead import SD15
from engine.checkpoints import detect, read_header
from engine.host_memory import keep_freed_memory
from engine.lora.files import LoraFiles
from engine.lora.names import unet_targets
from engine.lora.overlays import Overlays, Stack
from engine.unet import UNet
from luna_protocol.messages import LoraUse
from tests import checkpoints

ROOT = Path(__file__).resolve().parent.parent
MINIATURE = ROOT / "miniature" / "luna_miniature.safetensors"
RANK = 16
ENOUGH = 1 << 40


class Subject:
    """A UNet with two LoRAs of rank 16 over all attention and feed-forward layers, and the ways to run a step."""

    def __init__(self, path: Path, folder: Path, dtype: torch.dtype, size: int):
        self.path, self.folder, self.dtype = path, folder, dtype
        self.unet = UNet.load(path, detect(read_header(path)).parts["unet"], dtype, torch.device("cpu"))
        layout = self.unet.layout
        self.inputs = (
            torch.randn(2, layout.in_channels, size, size).to(dtype),
            torch.full((2,), 500.0),
            torch.randn(2, 77, layout.context_dim).to(dtype),
        )
        for name in ("a", "b"):
            _write_lora(self.unet, folder / f"{name}.safetensors")
        self.overlays = self.fresh()
        self.a, self.b = (self.overlays.stack([LoraUse(name=name, strength_patch=0.8)]) for name in ("a", "b"))

    def fresh(self) -> Overlays:
        """Overlays that hold none yet, their LoRA files parsed."""
        targets = unet_targets(self.unet.names)
        shapes = {name: parameter.shape for name, parameter in self.unet.model.named_parameters()}
        overlays = Overlays(self.unet.model, LoraFiles((self.folder,), targets, shapes, ENOUGH), ENOUGH)
        overlays.fit([overlays.stack([LoraUse(name=name)]) for name in ("a", "b")])
        return overlays

    def ways(self) -> dict[str, Callable[[], None]]:
        return {
            "without LoRA": lambda: self.step(Stack()),
            "overlay, steady": lambda: self.step(self.a),
            "two stacks in turn (each step)": self._alternating(),
            "beside the weights (side path)": self.beside,
            "patch in place and restore (the origin's way)": self.in_place,
        }

    @torch.inference_mode()
    def step(self, stack: Stack) -> None:
        with self.overlays.merged(stack):
            self.unet.forward(*self.inputs)

    def _alternating(self) -> Callable[[], None]:
        steps = iter(range(1 << 30))
        return lambda: self.step((self.a, self.b)[next(steps) % 2])

    @torch.inference_mode()
    def beside(self) -> None:
        with self.overlays.unmerged([(self.a, len(self.inputs[0]))]):
            self.unet.forward(*self.inputs)

    @torch.inference_mode()
    def in_place(self) -> None:
        parameters = dict(self.unet.model.named_parameters())
        patches = self.overlays._patches(self.a.loras)
        kept = {name: parameters[name].clone() for name in patches}
        for name, ((scaled,)) in patches.items():
            up, down = (scaled.patch.tensors[f"lora_{way}"].to(self.dtype) for way in ("up", "down"))
            delta = (up.flatten(1) @ down.flatten(1)).view_as(parameters[name])
            parameters[name].add_(delta, alpha=scaled.strength * scaled.patch.alpha / len(down))
        self.unet.forward(*self.inputs)
        for name, weight in kept.items():
            parameters[name].copy_(weight)

    def merge_seconds(self) -> float:
        overlays = self.fresh()
        begun = time.perf_counter()
        with overlays.merged(self.a):
            return time.perf_counter() - begun


def _write_lora(unet: UNet, path: Path) -> None:
    tensors = {}
    for key, name in unet.names.items():
        weight = unet.model.get_parameter(name)
        if name.endswith(".weight") and weight.ndim > 1 and (".attn" in name or ".ff." in name or ".proj_" in name):
            layer = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            out, inner, *kernel = weight.shape
            tensors[f"{layer}.lora_up.weight"] = (torch.randn(out, RANK, *[1] * len(kernel)) * 0.02).half()
            tensors[f"{layer}.lora_down.weight"] = (torch.randn(RANK, inner, *kernel) * inner**-0.5).half()
            tensors[f"{layer}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path)


def measure(title: str, subject: Subject, rounds: int) -> dict[str, float | None]:
    seconds = in_turns(subject.ways(), rounds, 1, warm_up=2)
    base = seconds["without LoRA"]
    # Each call is held against the forward without LoRA of its own round.
    ratios = {way: statistics.median(t / b for t, b in zip(times, base, strict=True)) for way, times in seconds.items()}
    merges = [subject.merge_seconds() for _ in range(5)]
    theirs = _comfyui_seconds(subject)
    rows = [[way, statistics.median(times) * 1e3, ratios[way]] for way, times in seconds.items()]
    first = min(merges) + statistics.median(base)
    rows.append(["overlay, first step", first * 1e3, first / statistics.median(base)])
    show(title, ["one step, batch 2", "ms", "to the forward without LoRA"], rows)
    told = [["merge", min(merges) * 1e3, None if theirs is None else min(merges) / theirs]]
    if theirs is not None:
        told.append(["ComfyUI's patching", theirs * 1e3, 1.0])
    show("The same file's merge", ["best of 5", "ms", "to ComfyUI's"], told)
    _, steady, alternating, beside, origin = ratios.values()
    return {
        "steady_ratio": steady,
        "alternating_ratio": alternating,
        "side_path_ratio": beside,
        "origin_ratio": origin,
        "merge_over_comfyui": None if theirs is None else min(merges) / theirs,
    }


def _comfyui_seconds(subject: Subject) -> float | None:
    """How long ComfyUI's ModelPatcher takes for the same weights and file, at its best of five, in its own process."""
    if "COMFYUI_DIR" not in os.environ:
        return None
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    worker = Path(__file__).with_name("comfyui_patching.py")
    dtype = str(subject.dtype).removeprefix("torch.")
    command = [python, str(worker), os.environ["COMFYUI_DIR"], str(subject.path), str(subject.folder / "a.safetensors")]
    environment = os.environ | {"PYTHONPATH": os.environ.get("COMFYUI_PYTHONPATH", "")}
    done = subprocess.run([*command, dtype], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"ComfyUI's patching failed:\n{done.stderr}")
    return min(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()  # as workers do
    with scratch_home() as home:
        miniature = Subject(MINIATURE, _folder(home / "miniature"), torch.float32, 16)
        result = measure("The miniature", miniature, 20 if options.quick else 40)
        if not options.quick:
            path = checkpoints.write(home / "sd15.safetensors", SD15)
            full = Subject(path, _folder(home / "full"), torch.float32, 16)
            result = measure("SD1.5 at full width, 128 px", full, 24)
    conclude(result)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    main()
