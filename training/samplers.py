"""Two of ComfyUI's samplers in a few lines, so that evaluation needs no client.

Both walk the noise levels `sigmas` down to zero and call `denoise(x, sigma) -> x0`. Euler is k-diffusion's (MIT), after
Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without churn; DPM++ 2M is Lu et al. 2022 (arXiv:2211.01095),
algorithm 2.
"""

from itertools import pairwise

import torch


def alphas_cumprod() -> torch.Tensor:
    """SD1.x's noise schedule ("scaled linear"), float32 [1000]: the share of the picture's variance left at a
    timestep."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def noise_levels(alphas_cumprod: torch.Tensor, steps: int) -> torch.Tensor:
    """`steps` sigmas at equal distances in time, falling, and a last 0: float32 [steps + 1]."""
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    timesteps = torch.linspace(len(sigmas) - 1, 0, steps)
    low = timesteps.long()
    high = (low + 1).clamp(max=len(sigmas) - 1)
    logs = torch.lerp(sigmas[low].log(), sigmas[high].log(), timesteps - low)
    return torch.cat([logs.exp(), torch.zeros(1)])


def euler(denoise, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Follows the probability flow in straight pieces."""
    for sigma, following in pairwise(sigmas):
        x = x + (x - denoise(x, sigma)) / sigma * (following - sigma)
    return x


def dpmpp_2m(denoise, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Second order in log-SNR, reusing the step before."""
    earlier, earlier_width = None, None
    for sigma, following in pairwise(sigmas):
        clean = denoise(x, sigma)
        if following == 0:
            return clean
        width = (sigma / following).log()
        ahead = clean if earlier is None else clean + (clean - earlier) * width / (2 * earlier_width)
        x = following / sigma * x - torch.expm1(-width) * ahead
        earlier, earlier_width = clean, width
    return x


SAMPLERS = {"euler": euler, "dpmpp_2m": dpmpp_2m}
