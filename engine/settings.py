"""What an archive's model-config.yaml tells its handler, under the key `handler`."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.roots import Roots, find
from luna_protocol.errors import NotFound


class HandlerSettings(BaseModel):
    """Settings that every role has.

    home is where the folders of `Roots` lie unless the environment says otherwise; checkpoint is a path relative to
    one of checkpoint_roots, which come before those of `Roots`: it stays the file that was packed; further are more
    files of the same kind, where text encoders come in several, and clip_type is ComfyUI's name of their kind; family
    is None for those that only a ComfyUI can serve; dtype "auto" follows `weights.compute_dtype`, or is ComfyUI's
    choice. Requests run together up to batch_positions rows x height x width of latents; one that is
    larger runs alone.
    """

    model_config = ConfigDict(extra="forbid")

    role: Literal["unet", "clip", "vae", "repository"]
    home: Path
    family: Literal["sd15", "sdxl"] | None = None
    checkpoint: str | None = None
    further: list[str] = Field(default=[], max_length=3)
    clip_type: str | None = None
    checkpoint_roots: list[Path] = []
    dtype: Literal["auto", "fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"] = "auto"
    tensor_cache_mb: int = Field(default=512, ge=1)
    batch_positions: int = Field(default=131072, ge=1)

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
        with suppress(NotFound):
            return find(tuple(self.checkpoint_roots), self.checkpoint, "checkpoint")
        return find((*self.checkpoint_roots, *self.roots.checkpoints), self.checkpoint, "checkpoint")


class PatchedSettings(HandlerSettings):
    """Settings of roles that take LoRAs.

    LoRAs as read and sent take lora_cache_mb of host memory, weights with LoRAs merged in lora_overlay_mb of the
    device's; without the latter, `FREE_SHARE` of what is free.
    """

    lora_cache_mb: int = Field(default=2048, ge=0)
    lora_overlay_mb: int | None = Field(default=None, ge=0)


class UNetSettings(PatchedSettings):
    """The step cache holds at most step_cache_mb, and drops what a run has not used for step_cache_ttl seconds.
    compile: whether to run `compile_blocks`."""

    compile: bool = False
    step_cache_mb: int = Field(default=1024, ge=0)
    step_cache_ttl: float = Field(default=300, gt=0, allow_inf_nan=False)


class QueueSettings(HandlerSettings):
    """Settings of roles that open the decode queue.

    At most queue_jobs jobs and queue_mb of their tensors wait in it, and as many that are dead; a job is dead after
    queue_attempts failures of its own. It lies in the spool folder unless queue_database is another SQLAlchemy URL.
    """

    queue_jobs: int = Field(default=1000, ge=1)
    queue_mb: int = Field(default=4096, ge=1)
    queue_attempts: int = Field(default=5, ge=1)
    queue_database: str | None = None


class VaeSettings(QueueSettings):
    """pictures_database is the SQLAlchemy URL of the pictures' records, by default a file in the spool folder; watcher
    the URL that is told of them. Pictures of more than tile_pixels are decoded in tiles."""

    pictures_database: str | None = None
    watcher: str | None = None
    tile_pixels: int = Field(default=2048 * 2048, ge=0)


SETTINGS: dict[str, type[HandlerSettings]] = {
    "unet": UNetSettings,
    "clip": PatchedSettings,
    "vae": VaeSettings,
    "repository": QueueSettings,
}


def settings_of(handler: dict[str, Any]) -> HandlerSettings:
    """The settings of its role under the key `handler` of a model-config.yaml."""
    return SETTINGS[handler["role"]].model_validate(handler)
