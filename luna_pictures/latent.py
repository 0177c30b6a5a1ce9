"""Latents that could not become pictures, as files that ComfyUI's Load Latent opens."""

from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

EXTENSION = ".latent"


def latent_file(latent: Tensor, texts: Mapping[str, str]) -> bytes:
    """The content of a file that holds `latent` [B, C, ...] and, as Save Latent writes them, the workflow's `texts`."""
    tensors = {"latent_tensor": latent.cpu().contiguous(), "latent_format_version_0": torch.tensor([])}
    return save(tensors, dict(texts))
