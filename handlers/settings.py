"""What an archive's model-config.yaml tells its handler, under the key `handler`."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from handlers.engine.checkpoints import DTYPES
from handlers.engine.roots import Roots, find
from protocol.errors import NotFound


class HandlerSettings(BaseModel):
    """Settings that every role has.

    home is where the folders of `Roots` lie unless the environment says otherwise; checkpoint is a path relative to
    one of checkpoint_roots, those of `Roots` searched first; dtype "auto" follows `compute_dtype`. A UNet's step cache
    holds at most step_cache_mb, and drops what a sampling run has not used for step_cache_ttl seconds.
    """

    model_config = ConfigDict(extra="forbid")

    role: Literal["unet", "clip", "vae", "repository"]
    home: Path
    family: Literal["sd15", "sdxl"] | None = None
    checkpoint: str | None = None
    checkpoint_roots: list[Path] = []
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    tensor_cache_mb: int = Field(default=512, ge=1)
    step_cache_mb: int = Field(default=1024, ge=0)
    step_cache_ttl: float = Field(default=300, gt=0, allow_inf_nan=False)

    @property
    def roots(self) -> Roots:
        return Roots.from_environment(self.home)

    def checkpoint_path(self) -> Path:
        """The checkpoint's file.

        Raises:
            NotFound: none of the roots has it.
        """
        if self.checkpoint is None:
            raise NotFound("this archive names no checkpoint", "pack it with scripts/add_checkpoint.py")
        own = tuple(self.checkpoint_roots)
        from_environment = self.roots.checkpoints
        return find((*from_environment, *own), self.checkpoint, "checkpoint")

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype to compute in. As ComfyUI chooses: fp32 on a CPU and for text encoders everywhere (their sums are
        small and the pictures follow them closely), fp16 for a UNet on a GPU, bf16 for a VAE there (SDXL's overflows
        in fp16)."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        if device.type == "cpu" or self.role == "clip":
            return torch.float32
        return torch.float16 if self.role == "unet" else torch.bfloat16
