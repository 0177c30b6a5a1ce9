"""Paints with a checkpoint in this process, no server between: the engine's models, diffusers' samplers."""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from engine import tokenizer
from engine.checkpoints import detect, read_header
from engine.layouts import marker_names
from engine.step_cache import StepCache, rows_of
from engine.step_policies import Policy
from engine.text_encoder import TextEncoder
from engine.unet import UNet
from engine.vae import VAE
from luna_protocol.errors import Impossible

LATENT_SCALE = {"sd15": 0.18215, "sdxl": 0.13025}  # UNet space = LATENT times this
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLERS: dict[str, Callable] = {
    "euler": lambda **more: EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="linspace", **more),
    "dpmpp_2m": lambda **more: DPMSolverMultistepScheduler(**_SCHEDULE, timestep_spacing="linspace", **more),
    "ddim": lambda **more: DDIMScheduler(**_SCHEDULE, timestep_spacing="trailing", clip_sample=False, **more),
    "uni_pc": lambda **more: UniPCMultistepScheduler(**_SCHEDULE, timestep_spacing="linspace", **more),
    "euler_ancestral": lambda **more: EulerAncestralDiscreteScheduler(**_SCHEDULE, timestep_spacing="linspace", **more),
    "dpmpp_2m_sde": lambda **more: DPMSolverMultistepScheduler(
        **_SCHEDULE, timestep_spacing="linspace", algorithm_type="sde-dpmsolver++", **more
    ),
}


Window = tuple[float, float]


@dataclass(frozen=True)
class Painting:
    """pictures: float32 [N, 3, H, W] in 0..1; skipped: share of UNet rows that were hits; seconds: what the UNet's
    evaluations took, processor time on a CPU (others may be using the machine) and wall time on a GPU."""

    pictures: Tensor
    skipped: float
    seconds: float


class Painter:
    """A whole checkpoint, frozen.

    Args:
        checkpoint: a single-file checkpoint with UNet, text encoders and VAE.
        device: where to compute, in float32 on a CPU and float16 elsewhere (the VAE in float32).

    Raises:
        Malformed, NotFound: as the engine's loaders; Impossible: the file lacks a part.
    """

    def __init__(self, checkpoint: Path, device: torch.device):
        header = read_header(checkpoint)
        detected = detect(header)
        if missing := {"unet", "clip", "vae"} - detected.parts.keys():
            raise Impossible(f"{checkpoint.name} has no {', '.join(sorted(missing))}", "give a whole checkpoint")
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        parts = detected.parts
        self.device = device
        self.family = detected.family
        self.unet = UNet.load(checkpoint, parts["unet"], dtype, device)
        self.encoders = {
            name: TextEncoder.load(checkpoint, parts["clip"], name, torch.float32, device)
            for name in sorted(parts["clip"].names, reverse=True)
        }
        self.vae = VAE.load(checkpoint, parts["vae"], torch.float32, device)
        self.prediction = "v_prediction" if "v_pred" in marker_names(header) else "epsilon"

    @torch.inference_mode()
    def paint(
        self,
        prompts: list[str],
        sampler: str,
        steps: int,
        settings: Sequence[tuple[Policy, Window] | None] = (None,),
        *,
        side: int,
        cfg: float = 6.0,
        seed: int = 0,
        negative: str = "",
    ) -> list[Painting]:
        """One painting per setting, each with one picture of side x side pixels per prompt.

        The settings take their steps in turn, so that whatever else the machine does slows all of them alike. The n-th
        picture depends on its prompt and seed + n alone.

        Args:
            settings: the step cache's policy and window; None computes everything.
        """
        condition = self._condition([negative] * len(prompts) + prompts, side)
        runs = [_Run(self, sampler, steps, len(prompts), side, cfg, seed, condition, one) for one in settings]
        for _ in range(steps):
            for run in runs:
                run.advance()
        return [run.painting() for run in runs]

    def _condition(self, texts: list[str], side: int) -> tuple[Tensor, Tensor | None]:
        several = self.family == "sdxl"
        states, pooled = [], None
        for name, encoder in self.encoders.items():
            ids = tokenizer.sections(texts, tokenizer.END if name == "clip_l" else 0)[:, 0].to(self.device)
            hidden, pooled = encoder.encode(ids, None, -2 if several else None, not several, several)
            states.append(hidden)
        context = torch.cat(states, dim=-1).to(self.unet.dtype)
        if not several:
            return context, None
        sizes = torch.tensor([side, side, 0.0, 0.0, side, side], device=self.device)
        numbers = get_timestep_embedding(sizes, 256, flip_sin_to_cos=True, downscale_freq_shift=0).flatten()
        return context, torch.cat([pooled, numbers.expand(len(texts), -1)], dim=1).to(self.unet.dtype)

    def clock(self) -> float:
        """Seconds of computing time: a difference of two counts."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Run:
    """One sampling run of some latents, step by step."""

    def __init__(
        self,
        painter: Painter,
        sampler: str,
        steps: int,
        count: int,
        side: int,
        cfg: float,
        seed: int,
        condition: tuple[Tensor, Tensor | None],
        setting: tuple[Policy, Window] | None,
    ):
        noises = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        self.painter, self.count, self.cfg, self.setting = painter, count, cfg, setting
        self.context, self.y = condition
        self.scheduler = SAMPLERS[sampler](prediction_type=painter.prediction)
        self.scheduler.set_timesteps(steps)
        stochastic = "generator" in inspect.signature(self.scheduler.step).parameters
        self.step_arguments = {"generator": noises} if stochastic else {}
        shape = (count, painter.unet.layout.out_channels, side // 8, side // 8)
        self.x = randn_tensor(shape, noises) * self.scheduler.init_noise_sigma
        self.cache = StepCache(painter.unet, 8 << 30, 3600)
        self.step, self.seconds, self.hits = 0, 0.0, 0

    def advance(self) -> None:
        painter, timestep = self.painter, self.scheduler.timesteps[self.step]
        x = self.scheduler.scale_model_input(torch.cat([self.x, self.x]), timestep)
        x = x.to(painter.device, painter.unet.dtype)
        conds = ["uncond"] * self.count + ["cond"] * self.count
        rows = rows_of("run", self.step, conds, *self.setting) if self.setting else ()
        begun = painter.clock()
        out, outcomes = self.cache.forward(x, timestep.float().expand(len(x)), self.context, self.y, rows=rows)
        self.seconds += painter.clock() - begun
        self.hits += sum(outcome.hit for outcome in outcomes)
        uncond, cond = out.float().cpu().chunk(2)
        guided = uncond + self.cfg * (cond - uncond)
        self.x = self.scheduler.step(guided, timestep, self.x, **self.step_arguments).prev_sample
        self.step += 1

    def painting(self) -> Painting:
        latent = self.x / LATENT_SCALE[self.painter.family]
        pixels = self.painter.vae.decode(latent.to(self.painter.device)).float().cpu()
        return Painting(((pixels + 1) / 2).clamp(0, 1), self.hits / (2 * self.count * self.step), self.seconds)
