"""What ComfyUI saves itself is, byte for byte, what the server's queue saves."""

import pytest
import torch

from comfy_client.saving import Batch, job_of
from comfy_client.saving_here import save_here
from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.picture_records import PictureRecords
from luna_protocol.errors import Malformed
from tests.engine.saving.save_jobs import decode, files_under, wait_for

LATENT = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
IMAGE = torch.rand(1, 24, 40, 3, generator=torch.Generator().manual_seed(2)) * 1.2 - 0.1
BATCHES = [
    Batch(1, "ORIG", "png", False, latent=LATENT),
    Batch(2, "UP", "png16", True, image=IMAGE),
    Batch(3, "", "webp", True, latent=LATENT),
    Batch(5, "LAST", "jpeg", True, image=IMAGE),
]
MAPS = {("positive", "original"): torch.rand(1, 8, 8)}


def a_job(batches=BATCHES, maps=MAPS, **settings):
    metadata = {"model": "a/b.safetensors", "seed": 7, "positive": "a fox"}
    return job_of(
        batches, maps, metadata=metadata, prompt={"1": {}}, extra_pnginfo={"workflow": {"nodes": []}}, **settings
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"filename": "%model_dir%/%seed%_%width%x%height%", "lossless_webp": True},
        {"embed_metadata": False, "png_compression": 9, "save_path": "%time:YYYY%"},
        {"quality_gate": "variance", "min_quality": 0.9},
    ],
)
def test_the_same_files_are_saved_here_and_there(tmp_path, settings):
    job, tensors, _ = a_job(**settings)
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "there")
    worker = DecodeWorker(queue, decode, records=PictureRecords(f"sqlite:///{tmp_path / 'pictures.sqlite3'}"))
    worker.start()
    try:
        queue.submit(job, tensors)
        wait_for(queue, job)
    finally:
        worker.stop()
        queue.close()
    here, _ = save_here(job, tensors, decode, [tmp_path / "here"])
    assert set(here) == files_under(tmp_path / "here")
    there = {path for path in files_under(tmp_path / "there") if not path.endswith(".safetensors")}
    assert set(here) == there and len(here) == 6
    for path in here:
        assert (tmp_path / "here" / path).read_bytes() == (tmp_path / "there" / path).read_bytes(), path


def test_nothing_is_written_over(tmp_path):
    job, tensors, _ = a_job([Batch(1, "", "png", False, latent=LATENT[:1])], {}, filename="same")
    assert save_here(job, tensors, decode, [tmp_path]) == (["same.png"], [])
    first = (tmp_path / "same.png").read_bytes()
    assert save_here(job, tensors, decode, [tmp_path]) == (["same_00001.png"], [])
    assert (tmp_path / "same.png").read_bytes() == first


def test_an_image_travels_in_the_bits_that_its_format_keeps():
    _, tensors, _ = a_job()
    assert tensors["image_2"].dtype == torch.float32 and tensors["image_5"].dtype == torch.uint8


def test_nothing_to_save_is_told():
    with pytest.raises(Malformed, match="nothing to save"):
        a_job([])
