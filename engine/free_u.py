"""FreeU: re-weights what enters an output block (Si et al. 2023, arXiv:2309.11497).

As in the authors' reference implementation, whose two versions ComfyUI has as FreeU and FreeU_V2: the first half of the
backbone's channels is amplified, the skip connection's low frequencies are scaled.
"""

import torch
from torch import Tensor

from engine.diffusers_modules import fourier_filter
from luna_protocol.messages import FreeU


def reweigh(h: Tensor, skip: Tensor, model_channels: int, settings: FreeU) -> tuple[Tensor, Tensor]:
    """Backbone h [B, c, H, W] and skip [B, c', H, W]; unchanged where c is neither 4 nor 2 times model_channels."""
    scales = {4 * model_channels: (settings.b1, settings.s1), 2 * model_channels: (settings.b2, settings.s2)}
    if h.shape[1] not in scales:
        return h, skip
    backbone, low_frequencies = scales[h.shape[1]]
    half, rest = h.tensor_split([h.shape[1] // 2], dim=1)
    factor = backbone
    if settings.version == 2:
        mean = h.mean(dim=1, keepdim=True)
        low, high = mean.amin((1, 2, 3), keepdim=True), mean.amax((1, 2, 3), keepdim=True)
        factor = (backbone - 1) * ((mean - low) / (high - low)) + 1
    return torch.cat((half * factor, rest), dim=1), fourier_filter(skip, threshold=1, scale=low_frequencies)
