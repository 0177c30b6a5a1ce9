"""Keeps a training run's tensors on disk, so that an interrupted run goes on where it stood."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save(path: Path, step: int, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Writes `modules`, the optimizer's moments and the step count to `path`, replacing it atomically."""
    tensors = {"step": torch.tensor(step)}
    for name, module in modules.items():
        tensors |= {f"module.{name}.{key}": value.contiguous() for key, value in module.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value.contiguous() for key, value in moments.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def restore(path: Path, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Brings `modules` and `optimizer` to where `save` left them; returns the step count, 0 without a file."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    step = int(tensors.pop("step"))
    moments = {}
    for name, value in tensors.items():
        kind, owner, key = name.split(".", 2)
        if kind == "optimizer":
            moments.setdefault(int(owner), {})[key] = value
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)})
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
