"""What step cache settings cost and gain, measured against the uncached picture and against taking fewer steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.step_presets import Setting
from scripts.sampling import Painter


@dataclass(frozen=True)
class Comparison:
    """One setting, or none (`setting` None: fewer steps), against the uncached run.

    steps: how many it took; speedup: the uncached run's computing time over its own, for fewer steps the steps' ratio;
    skipped: share of UNet rows that were hits; psnr [N] in dB, ssim [N] per picture; pictures [N, 3, H, W] in 0..1;
    fewer: the uncached run of as many steps as cost the same, None where this is one.
    """

    setting: Setting | None
    steps: int
    speedup: float
    skipped: float
    psnr: Tensor
    ssim: Tensor
    pictures: Tensor
    fewer: "Comparison | None" = None

    @property
    def beats_fewer_steps(self) -> bool:
        """Nearer to the uncached picture than fewer steps come, on average and at worst."""
        return bool(self.psnr.mean() > self.fewer.psnr.mean() and self.psnr.min() > self.fewer.psnr.min())

    @property
    def figures(self) -> dict[str, float]:
        return {
            "speedup": self.speedup,
            "skipped": self.skipped,
            "psnr_mean": self.psnr.mean().item(),
            "psnr_min": self.psnr.min().item(),
            "ssim_mean": self.ssim.mean().item(),
        }


def compare(
    painter: Painter, prompts: list[str], sampler: str, steps: int, settings: Sequence[Setting], **how
) -> tuple[Tensor, list[Comparison]]:
    """The uncached pictures [N, 3, H, W], and a comparison per setting. `how`: as `Painter.paint`."""
    plain, *cached = painter.paint(prompts, sampler, steps, [None, *(one.resolved() for one in settings)], **how)
    references = plain.pictures
    shorter: dict[int, Comparison] = {}

    def fewer(count: int) -> Comparison:
        if count not in shorter:
            pictures = painter.paint(prompts, sampler, count, **how)[0].pictures if count < steps else references
            near = psnr(pictures, references), ssim(pictures, references)
            shorter[count] = Comparison(None, count, steps / count, 0.0, *near, pictures)
        return shorter[count]

    comparisons = []
    for setting, painting in zip(settings, cached, strict=True):
        speedup = plain.seconds / painting.seconds
        near = psnr(painting.pictures, references), ssim(painting.pictures, references)
        as_costly = fewer(max(1, round(steps / speedup)))
        comparisons.append(Comparison(setting, steps, speedup, painting.skipped, *near, painting.pictures, as_costly))
    return references, comparisons


def psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """Decibels per picture [N] of pictures [N, 3, H, W] in 0..1 against references; identical ones give 100."""
    error = (pictures - references).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=100.0)


def ssim(pictures: Tensor, references: Tensor) -> Tensor:
    """Structural similarity per picture [N], of pictures [N, 3, H, W] in 0..1.

    Source: Wang et al. 2004, "Image Quality Assessment", with its constants and 11 x 11 Gaussian window, per channel.
    """
    offsets = torch.arange(11.0) - 5
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)

    def blur(values: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(values, window, groups=3)

    a, b = blur(pictures), blur(references)
    aa, bb, ab = blur(pictures**2) - a * a, blur(references**2) - b * b, blur(pictures * references) - a * b
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))
    return values.flatten(1).mean(1)
