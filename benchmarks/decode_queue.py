"""What saving later is worth: a sampler that never waits, against one that decodes and saves before it goes on.

Three questions. Ten batches on a real server, whose UNet and VAE have a worker each: how near to the bound, the
slower of sampling and decoding ten times and the other once? The origin's own mix (5 s sampling, 3 s decoding, 1 s
saving, ten times), sampling and decoding slept, saving real. And how long does the node's call take, compared with
writing the same bytes durably?
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from benchmarks._bench import arguments, conclude, in_turns, median_ms, scratch_home, serving, show
from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.picture_records import PictureRecords
from luna_client.server import Server
from luna_pictures.encoding import encode
from luna_protocol.blob import pack
from luna_protocol.messages import DescribeModel, UNetForward, VaeDecode
from luna_protocol.save_job import Heatmap, PictureGroup, QueueStatus, SaveJob
from serving.archives import pack_checkpoint, pack_repository
from serving.torchserve import ROOT
from tests.checkpoints import write

MINIATURE = ROOT / "miniature" / "luna_miniature.safetensors"
BATCHES = 10
ORIGIN_SAMPLE, ORIGIN_DECODE = 5.0, 3.0
MEGAPIXEL = torch.rand(1, 1024, 1024, 3)


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    with scratch_home() as home:
        checkpoint = MINIATURE if MINIATURE.exists() else write(home / "random.safetensors", "tiny_sd15")
        archives = pack_repository(home / "model_store", home) + pack_checkpoint(
            checkpoint, home / "model_store", "bench", "fp32", home
        )
        models = [archive.model for archive in archives if not archive.model.endswith(".clip")]
        with serving(home, models) as (_, server):
            ratio = ten_batches(server, checkpoint.stem, home, 16 if options.quick else 32)
            over_fsync = submit(server, home, 15 if options.quick else 50)
        origin = origin_mix(home / "origin", 0.2 if options.quick else 1.0)
    conclude({"ratio_to_bound": ratio, "origin_mix_s": origin, "submit_over_fsync": over_fsync})


def ten_batches(server: Server, checkpoint: str, home: Path, side: int) -> float:
    """Time of ten asynchronous batches of latents `side` x `side` over the bound. A batch samples half as long again
    as it takes to decode and save it, about as in the origin's mix."""
    latent = torch.randn(2, 4, side, side)
    context = torch.randn(2, 77, _context_width(server))
    tensors = {"x": latent, "timesteps": torch.full((2,), 500.0), "context": context}

    def step() -> None:
        server.call("bench.unet", UNetForward(), tensors)

    def save_and_wait() -> None:
        _wait(server, [_save(server, latent)])

    def save_here() -> None:
        pixels = server.call("bench.vae", VaeDecode(), {"latent": latent})[1]["pixels"]
        images = ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        job = a_job()
        for row, image in enumerate(images):
            (home / f"{uuid4().hex}.png").write_bytes(encode(image, job, job.groups[0], row))

    alone = in_turns({"step": step, "save": save_and_wait}, 3, 2, warm_up=1)
    steps = max(1, round(1.5 * median_ms(alone["save"]) / median_ms(alone["step"])))

    def sample() -> None:
        for _ in range(steps):
            step()

    alone = in_turns({"sample": sample, "save": save_and_wait}, 3, 1, warm_up=1)
    sampling, saving = median_ms(alone["sample"]) / 1e3, median_ms(alone["save"]) / 1e3
    begun = time.perf_counter()
    for _ in range(BATCHES):
        sample()
        save_here()
    blocking = time.perf_counter() - begun
    begun, jobs = time.perf_counter(), []
    for _ in range(BATCHES):
        sample()
        jobs.append(_save(server, latent))
    _wait(server, jobs)
    asynchronous = time.perf_counter() - begun
    bound = BATCHES * max(sampling, saving) + min(sampling, saving)
    show(
        f"Ten batches of two {8 * side} x {8 * side} pictures, {checkpoint}, on {os.cpu_count()} cores",
        ["", "seconds", "over the bound"],
        [
            ["one batch, sampled alone", sampling, ""],
            ["one batch, decoded and saved alone", saving, ""],
            ["the bound", bound, 1.0],
            ["decoded and saved before going on", blocking, blocking / bound],
            ["saved by the queue", asynchronous, asynchronous / bound],
        ],
    )
    return asynchronous / bound


def submit(server: Server, home: Path, calls: int) -> float:
    """Time of the node's call over that of writing the same bytes durably: file and folder synced."""
    # As many bytes as one SDXL latent, most of them in a heatmap, so that decoding it does not take the cores.
    tensors = {"latent": torch.zeros(1, 4, 8, 8), "heat": torch.rand(4, 128, 128)}
    heatmaps = [Heatmap(tensor="heat", polarity="positive", stage="original")]
    body = bytes(pack(a_job(heatmaps=heatmaps), tensors))
    folder = home / "written"
    folder.mkdir()

    def write_file() -> None:
        with (folder / uuid4().hex).open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())

    def write_durably() -> None:
        write_file()
        if os.name != "nt":
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    def save_alone() -> float:
        """Seconds of the call; the next one begins when the worker is at rest, as it is between two samplings."""
        job = a_job(heatmaps=heatmaps)
        begun = time.perf_counter()
        server.call("bench.vae", job, tensors)
        taken = time.perf_counter() - begun
        _wait(server, [job.job_id])
        return taken

    seconds: dict[str, list[float]] = {
        "the node's call": [],
        "file and folder synced": [],
        "file synced, its name not": [],
    }
    for _ in range(calls):
        for name, way in zip(seconds, (save_alone, _timed(write_durably), _timed(write_file)), strict=True):
            seconds[name].append(way())
    taken = {name: median_ms(each) for name, each in seconds.items()}
    call, durable = taken["the node's call"], taken["file and folder synced"]
    rows = [[name, ms, call / ms] for name, ms in taken.items()]
    show(f"Accepting {len(body) // 1024} KiB", ["", "ms", "the call takes, times this"], rows)
    return call / durable


def origin_mix(home: Path, scale: float) -> float:
    """Seconds that the origin's ten batches take with our queue; run `scale` times as fast and told at full length."""
    queue = DecodeQueue(home / "spool", home / "output")
    records = PictureRecords(f"sqlite:///{home / 'spool' / 'pictures.sqlite3'}")
    saving: list[float] = []

    def decode(latent: Tensor) -> Tensor:
        time.sleep(ORIGIN_DECODE * scale)
        return MEGAPIXEL

    def observe(name: str, seconds: float) -> None:
        if name == "write":
            saving.append(seconds)

    worker = DecodeWorker(queue, decode, records=records, observe=observe)
    worker.start()
    begun = time.perf_counter()
    for _ in range(BATCHES):
        time.sleep(ORIGIN_SAMPLE * scale)
        queue.submit(a_job(), {"latent": torch.zeros(1, 4, 128, 128)})
    while queue.report(QueueStatus(limit=0)).counts["done"] < BATCHES:
        time.sleep(0.005)
    took = (time.perf_counter() - begun) / scale
    worker.stop()
    queue.close()
    records.close()
    show(
        f"The origin's ten batches: 5 s sampling, 3 s decoding, then saving, run {1 / scale:g} times as fast",
        ["", "seconds"],
        [
            ["blocking, 1 s saving", BATCHES * (ORIGIN_SAMPLE + ORIGIN_DECODE + 1)],
            ["the origin's queue, as it claimed", "51-53"],
            ["this queue", took],
            ["of which one 1024 x 1024 PNG, encoded and written", sum(saving) / len(saving) / scale],
        ],
    )
    return took


def _timed(way: Callable[[], None]) -> Callable[[], float]:
    def timed() -> float:
        begun = time.perf_counter()
        way()
        return time.perf_counter() - begun

    return timed


def a_job(**fields) -> SaveJob:
    group = PictureGroup(source="latent", tensor="latent", format="png")
    return SaveJob(job_id=uuid4().hex, groups=[group], created=time.time(), **fields)


def _save(server: Server, latent: Tensor) -> str:
    job = a_job()
    server.call("bench.vae", job, {"latent": latent})
    return job.job_id


def _wait(server: Server, jobs: list[str]) -> None:
    asked = QueueStatus(job_ids=jobs)
    while any(job["state"] != "done" for job in server.ask(asked)["jobs"]):
        time.sleep(0.02)


def _context_width(server: Server) -> int:
    shapes = server.ask(DescribeModel(model="bench.unet"))["shapes"]
    return next(
        shape[1] for part in shapes.values() for name, shape in part.items() if name.endswith("attn2.to_k.weight")
    )


if __name__ == "__main__":
    main()
