"""Set up, serve a checkpoint on free ports, make one picture over its REST API, and shut everything down."""

import _environment

STARTED = _environment.ensure()

import argparse
import os
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from luna_client.server import Server
from luna_protocol.errors import LunaError
from luna_protocol.messages import ClipText, DescribeModel, ModelDescription, UNetForward, validate
from luna_protocol.save_job import PictureGroup, QueueReport, QueueStatus, SaveJob
from serving.archives import pack_checkpoint, pack_repository
from serving.loading import load, overview
from serving.specs import SpecError
from serving.stopping import Stopped, stop_on_signals
from serving.torchserve import ROOT, Ports, TorchServe

CHECKPOINT = ROOT / "miniature" / "luna_miniature.safetensors"
OUTPUT = ROOT / "output"
PROMPT = "a red circle on a white background"
STEPS, GUIDANCE, SEED = 25, 5.0, 1
LATENT_SCALE = 0.18215  # UNet space = LATENT * this, for SD1.5


class Stopwatch:
    """How long each step took, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, step: str):
        begun = time.monotonic()
        yield
        self.seconds[step] = time.monotonic() - begun

    def table(self) -> Table:
        table = Table("where the time went", "seconds")
        for step, seconds in self.seconds.items():
            table.add_row(step, f"{seconds:8.2f}")
        table.add_row("in all", f"{sum(self.seconds.values()):8.2f}", style="bold")
        return table


def noise_levels(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps [steps] at equal distances, and their sigmas [steps + 1] with a last 0, of Stable Diffusion's betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    timesteps = torch.linspace(999, 0, steps).round().long()
    sigmas = ((1 - alphas) / alphas).sqrt()[timesteps]
    return timesteps.float(), torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def sample(server: Server, unet: str, conds: torch.Tensor, size: int, v_prediction: bool) -> torch.Tensor:
    """Euler's method (Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn) with classifier-free guidance.

    conds: [2, T, D], the prompt's and the empty one's. Returns UNet-space latents [1, 4, size / 8, size / 8].
    """
    timesteps, sigmas = noise_levels(STEPS)
    noise = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(SEED))
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    for step in track(range(STEPS), "sampling"):
        sigma, scale = sigmas[step], (1 + sigmas[step] ** 2).sqrt()
        tensors = {"x": (x / scale).repeat(2, 1, 1, 1), "timesteps": timesteps[step].repeat(2), "context": conds}
        prompted, empty = server.call(unet, UNetForward(), tensors)[1]["out"].float().chunk(2)
        predicted = empty + GUIDANCE * (prompted - empty)
        noise = predicted / scale + x * sigma / scale**2 if v_prediction else predicted
        x = x + noise * (sigmas[step + 1] - sigma)
    return x


def save(server: Server, vae: str, latent: torch.Tensor, prompt: str) -> Path:
    """Have a LATENT [1, 4, h, w] decoded and saved by the server's queue, and wait for the picture."""
    job = SaveJob(
        job_id=uuid.uuid4().hex,
        groups=[PictureGroup(source="latent", tensor="latent", format="png", subdir=False)],
        filename="quickstart_%time:YYYY_mm_dd.HH.MM.SS%",
        metadata={"positive": prompt, "seed": SEED, "steps": STEPS, "cfg": GUIDANCE},
        created=time.time(),
    )
    server.call(vae, job, {"latent": latent})
    while True:
        report = validate(QueueReport, server.call(vae, QueueStatus(job_ids=[job.job_id]))[0])
        [status] = report.jobs
        if status.state == "done":
            return OUTPUT / status.files[0].path
        if status.state == "dead":
            raise RuntimeError(f"the picture could not be saved: {status.reason}")
        time.sleep(0.05)


def make_picture(server: Server, name: str, prompt: str, size: int, watch: Stopwatch) -> Path:
    with watch.time("prompt"):
        conds = server.call(f"{name}.clip", ClipText(texts=[prompt, ""]))[1]["hidden"]
    with watch.time(f"sampling, {STEPS} steps"):
        described = server.ask(DescribeModel(model=f"{name}.unet"))
        markers = validate(ModelDescription, described).markers
        latent = sample(server, f"{name}.unet", conds, size, "v_pred" in markers)
    with watch.time("decode and save"):
        path = save(server, f"{name}.vae", latent / LATENT_SCALE, prompt)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="an SD1.5 file (%(default)s)")
    parser.add_argument("--prompt", default=PROMPT, help="(%(default)s)")
    parser.add_argument(
        "--size", type=int, default=128, help="of the picture, in pixels; a multiple of 64 (%(default)s)"
    )
    parser.add_argument("--stay", action="store_true", help="keep serving until Ctrl-C")
    arguments = parser.parse_args()
    console = Console()
    watch = Stopwatch()
    watch.seconds["environment"] = time.time() - STARTED
    stop_on_signals()
    home = ROOT / "run" / "quickstart"
    os.environ |= {"LUNA_HOME": str(home), "LUNA_OUTPUT": str(OUTPUT)}
    store = home / "model_store"
    torchserve = TorchServe(store, home / "run", Ports.free())
    try:
        with watch.time("archives"):
            archives = pack_checkpoint(arguments.checkpoint, store, home=home) + pack_repository(store, home)
        with watch.time("TorchServe"):
            torchserve.start()
        server = Server(torchserve.inference, torchserve.management, torchserve.key_file)
        with watch.time("loading"):
            load(server, [archive.model for archive in archives], console)
        console.print(overview(server.index()))
        path = make_picture(server, archives[0].model.rpartition(".")[0], arguments.prompt, arguments.size, watch)
        console.print(f"{arguments.prompt!r}: {path}", soft_wrap=True)
        if arguments.stay:
            console.print(watch.table())
            console.print(f"Serving at {torchserve.inference}, tokens in {torchserve.key_file}. Ctrl-C stops it.")
            torchserve.wait()
            return 1
        with watch.time("shutting down"):
            torchserve.stop()
        console.print(watch.table())
        return 0
    except Stopped:
        console.print("Stopped.")
        return 0
    except (LunaError, SpecError, RuntimeError, OSError) as error:
        console.print(f"[red]{escape(str(error))}")
        return 1
    finally:
        torchserve.stop()


if __name__ == "__main__":
    sys.exit(main())
