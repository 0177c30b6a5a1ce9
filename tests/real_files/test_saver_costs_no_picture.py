"""Whatever is wrong with one picture, its name, its metadata or the folder: what can be saved is saved, the same on the
server and in ComfyUI, and what was left out is said."""

import enum
import json
import queue
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from comfy_client.queue_watch import QueueWatch
from comfy_client.saving import Batch, job_of
from comfy_client.saving_here import save_here
from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.picture_records import PICTURES, PictureRecords
from luna_protocol.blob import pack, unpack
from luna_protocol.errors import Impossible
from luna_protocol.save_job import JobStatus, QueueStatus, SaveAccepted, SaveJob
from tests.engine.saving.save_jobs import decode, files_under, wait_for

LATENT = torch.rand(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
NAN = float("nan")
BASE64 = "iVBORw0KGgo+/" * 170_000  # 2.2 MB, as nodes keep a painted mask in a widget


def a_job(*batches: Batch, **settings):
    return job_of(batches or [latents("png")], {}, **({"filename": "x", "png_compression": 6} | settings))


def latents(picture_format: str, latent=LATENT, affix: str = "") -> Batch:
    return Batch(1, affix, picture_format, False, latent=latent)


def images(picture_format: str, image) -> Batch:
    return Batch(2, "", picture_format, False, image=image)


class Served:
    """A queue with a worker, whose pictures go under `output`."""

    def __init__(self, home: Path, decode=decode) -> None:
        self.output = home / "there"
        self.records = PictureRecords(f"sqlite:///{home / 'pictures.sqlite3'}")
        self.queue = DecodeQueue(home / "spool", self.output)
        self._worker = DecodeWorker(self.queue, decode, records=self.records)
        self._worker.start()

    def save(self, job: SaveJob, tensors) -> tuple[SaveAccepted, JobStatus]:
        # By the wire's form, as a client sends it.
        message, tensors = unpack(pack(job, tensors))
        accepted = self.queue.submit(SaveJob.model_validate(message), tensors)
        return accepted, wait_for(self.queue, job, "done", "dead")

    def ask(self, asked: QueueStatus) -> dict:
        """As `Server.ask` does."""
        return self.queue.report(asked).model_dump(mode="json")

    def end(self) -> None:
        self._worker.stop()
        self.queue.close()
        self.records.close()


@pytest.fixture
def served(tmp_path):
    made = []

    def serve(decode=decode) -> Served:
        made.append(Served(tmp_path, decode))
        return made[-1]

    yield serve
    for each in made:
        each.end()


def saved_on_both_sides(served: Served, here: Path, job: SaveJob, tensors) -> tuple[list[str], list[str]]:
    accepted, status = served.save(job, tensors)
    files, notes = save_here(job, tensors, decode, [here])
    assert status.state == "done" and set(files) == files_under(here)
    assert (files, notes) == (accepted.files, accepted.warnings)
    for file in files:
        assert (here / file).read_bytes() == (served.output / file).read_bytes(), file
    return files, notes


def opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        image.load()
    return image


def test_one_nan_latent_of_four(served, tmp_path):
    batch = LATENT.clone()
    batch[1, 0, 0, 0] = NAN
    job, tensors, _ = a_job(latents("png", batch))
    files, notes = saved_on_both_sides(served(), tmp_path / "here", job, tensors)
    assert files == ["x_00.png", "x_02.png", "x_03.png"]
    assert notes == ["latent_1 holds NaN or infinity in batch row 1, which makes no picture"]


def test_one_slot_of_nan_beside_a_good_one(served, tmp_path):
    job, tensors, _ = a_job(latents("png", LATENT * NAN), images("png", torch.rand(1, 8, 8, 3)))
    files, notes = saved_on_both_sides(served(), tmp_path / "here", job, tensors)
    assert files == ["x.png"] and notes == [
        "latent_1 holds NaN or infinity in batch row 0, 1, 2, 3, which makes no picture"
    ]


def test_nothing_but_nan_is_an_error(served, tmp_path):
    job, tensors, _ = a_job(latents("png", LATENT * NAN))
    with pytest.raises(Impossible, match="latent_1 holds NaN or infinity in batch row 0, 1, 2, 3"):
        served().queue.submit(job, tensors)
    with pytest.raises(Impossible, match="latent_1 holds NaN or infinity in batch row 0, 1, 2, 3"):
        save_here(job, tensors, decode, [tmp_path])


def test_a_picture_with_some_pixels_of_nan_is_saved_as_save_image_does(served, tmp_path):
    image = torch.full((2, 8, 8, 3), 0.5)
    image[0, 0, 0], image[0, 0, 1] = NAN, float("inf")
    job, tensors, notes = a_job(images("png", image))
    assert notes == ["image_2 holds NaN or infinity here and there, which is saved as black or white"]
    files, _ = saved_on_both_sides(served(), tmp_path / "here", job, tensors)
    pixels = np.asarray(opened(tmp_path / "here" / files[0]))
    assert (pixels[0, :3] == [[0] * 3, [255] * 3, [127] * 3]).all()


def half_nan(latent):
    """A VAE in fp16 that overflows on bright latents."""
    return torch.where((latent[:, :1, :1, :1] > 0.5).movedim(1, 3), NAN, decode(latent))


@pytest.mark.parametrize("side", ["there", "here"])
def test_a_vae_that_makes_nan_of_some_leaves_their_latents(side, served, tmp_path):
    batch = LATENT * 0.1
    batch[2] += 1
    job, tensors, _ = a_job(latents("webp", batch), save_mode="database_store", prompt={"1": {}})
    if side == "there":
        there = served(half_nan)
        _, status = there.save(job, tensors)
        files = [file.path for file in status.files]
        assert status.state == "done" and status.reason == "the VAE made NaN of x_02.latent"
        with there.records.engine.connect() as db:
            assert len(db.execute(PICTURES.select()).all()) == 3
        kept = "x_02.latent"
        told: queue.Queue = queue.Queue()
        watch = QueueWatch(lambda event, message: told.put((event, message)))
        watch.follow(there, job.job_id, "7")
        assert told.get(timeout=30)[0] == "luna.saved"
        assert told.get(timeout=30)[1]["message"].endswith("is saved in part: the VAE made NaN of x_02.latent")
    else:
        files, notes = save_here(job, tensors, half_nan, [tmp_path / "here"])
        assert "NaN of row 2" in notes[0] and "Load Latent" in notes[1]
        kept = "x.latent"
    assert set(files) == {"x_00.webp", "x_01.webp", "x_03.webp", kept}
    # As ComfyUI's LoadLatent reads it: without the second key it would scale the values.
    tensors = load((tmp_path / side / kept).read_bytes())
    assert torch.equal(tensors["latent_tensor"], batch[2:3]) and "latent_format_version_0" in tensors


def test_latents_that_nothing_can_decode_become_one_file(tmp_path):
    def no_vae(latent):
        raise Impossible("there is no VAE")

    job, tensors, _ = a_job(latents("png"), images("png", torch.rand(1, 8, 8, 3)), prompt={"3": {"class_type": "K"}})
    files, notes = save_here(job, tensors, no_vae, [tmp_path])
    assert files == ["x.latent", "x.png"] and notes[0] == "there is no VAE"
    assert torch.equal(load((tmp_path / files[0]).read_bytes())["latent_tensor"], LATENT)
    assert b"class_type" in (tmp_path / files[0]).read_bytes(), "the workflow, as Save Latent writes it"


def test_frames_of_a_video_are_pictures(tmp_path):
    job, tensors, _ = a_job(latents("png", torch.rand(1, 16, 2, 4, 4)))
    files, _ = save_here(job, tensors, lambda latent: torch.rand(1, 5, 32, 32, 3), [tmp_path])
    assert files == [f"x_{frame:02d}.png" for frame in range(5)]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "output").write_text("a file where the folder was")
    job, tensors, _ = a_job(latents("png", LATENT[:1]))
    files, notes = save_here(job, tensors, decode, [tmp_path / "output", tmp_path / "temp"])
    assert files == [str(tmp_path / "temp" / "x.png")] and opened(Path(files[0])).size == (32, 32)
    assert "output takes no pictures (" in notes[0] and "move them" in notes[1]
    with pytest.raises(Impossible, match="takes no pictures"):
        save_here(job, tensors, decode, [tmp_path / "output"])


def test_a_link_to_another_disk_is_followed_here(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    job, tensors, _ = a_job(latents("png", LATENT[:1]), save_path="link/sub")
    assert save_here(job, tensors, decode, [tmp_path / "output"]) == (["link/sub/x.png"], [])
    assert (tmp_path / "disk" / "sub" / "x.png").is_file()


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (images("webp", torch.rand(1, 2, 16_384, 3)), "webp holds no pictures of 16384 x 2"),
        (images("jpeg", torch.rand(1, 2, 65_501, 3)), "jpeg holds no pictures of 65501 x 2"),
        (images("jpeg", torch.rand(1, 8, 8, 4)), "jpeg holds no transparent pictures of 8 x 8"),
        (latents("webp", torch.rand(1, 4, 1, 2048)), "webp holds no pictures of 16384 x 8"),
    ],
    ids=["wide webp", "wide jpeg", "transparent jpeg", "wide latent"],
)
def test_a_picture_that_its_format_cannot_hold_becomes_a_png(batch, told, served, tmp_path):
    job, tensors, _ = a_job(batch, save_mode="database_store")
    files, notes = saved_on_both_sides(there := served(), tmp_path / "here", job, tensors)
    assert files == ["x.png"] and told in notes[0]
    with there.records.engine.connect() as db:
        assert db.execute(PICTURES.select()).one().format == "png"


def test_images_of_a_mask_or_without_a_batch(served, tmp_path):
    job, tensors, _ = a_job(images("png", torch.rand(8, 8, 1)))
    assert saved_on_both_sides(served(), tmp_path / "here", job, tensors) == (["x.png"], [])


def test_a_slot_with_a_latent_and_an_image_saves_both(served, tmp_path):
    both = [
        Batch(n, "A", "png", False, **what)
        for n in range(1, 6)
        for what in ({"latent": LATENT[:1]}, {"image": torch.rand(1, 8, 8, 3)})
    ]
    job, tensors, _ = a_job(*both)
    files, _ = saved_on_both_sides(served(), tmp_path / "here", job, tensors)
    assert len(set(files)) == 10


def test_a_batch_of_a_hundred(served, tmp_path):
    job, tensors, _ = a_job(latents("png", torch.rand(100, 4, 1, 1)))
    files, _ = saved_on_both_sides(served(), tmp_path / "here", job, tensors)
    assert files[0] == "x_00.png" and files[-1] == "x_99.png"


@pytest.mark.parametrize(
    ("settings", "file", "told"),
    [
        ({"filename": "%date:yyyy%/%KSampler.seed%"}, "2001/%KSampler.seed%.png", "%KSampler.seed% is no variable"),
        ({"filename": ""}, None, None),
        ({"filename": "\u3000"}, None, None),
        ({"filename": "a:b"}, "a_b.png", None),
        ({"filename": "../../x"}, "x.png", "leaves the output folder"),
        ({"save_path": "/home/me"}, "home/me/x.png", "is absolute"),
        ({"save_path": "D:\\me"}, "me/x.png", "is absolute"),
        ({"filename": "y" * 600}, f"{'y' * 180}.png", "has 600 characters"),
        ({"save_path": "/".join(["\u65e5" * 85] * 5)}, None, None),
    ],
)
def test_names_from_another_node_are_made_safe(settings, file, told, served, tmp_path, monkeypatch):
    monkeypatch.setattr("comfy_client.saving.time.time", lambda: 1e9)
    job, tensors, notes = a_job(latents("png", LATENT[:1]), **settings)
    files, others = saved_on_both_sides(served(), tmp_path / "here", job, tensors)
    assert file is None or files == [file]
    assert told is None or any(told in note for note in notes + others)


def test_a_long_affix_is_cut(tmp_path):
    job, tensors, notes = a_job(latents("png", LATENT[:1], "z" * 90))
    assert notes == ["affix_1 has 90 characters and is cut to 64"]
    assert save_here(job, tensors, decode, [tmp_path]) == ([f"x_{'z' * 64}.png"], [])


def test_a_jpeg_saved_here_says_that_it_loses_its_workflow(tmp_path):
    job, tensors, _ = a_job(latents("jpeg", LATENT[:1]), extra_pnginfo={"workflow": "w" * 70_000})
    assert "does not fit into a JPEG's 64 KB" in save_here(job, tensors, decode, [tmp_path])[1][0]


@pytest.mark.parametrize("picture_format", ["png", "webp"])
def test_megabytes_of_base64_in_a_widget_travel_and_are_written(picture_format, served, tmp_path):
    prompt = {"7": {"class_type": "Painter", "inputs": {"image": BASE64}}}
    job, tensors, notes = a_job(
        latents(picture_format, LATENT[:1]), prompt=prompt, extra_pnginfo={"workflow": {"nodes": [BASE64]}}
    )
    files, others = saved_on_both_sides(served(), tmp_path / "here", job, tensors)
    assert notes + others == []
    image = opened(tmp_path / "here" / files[0])
    held = image.info.get("prompt") or image.getexif()[0x0110].removeprefix("prompt:")
    assert json.loads(held) == prompt


def test_metadata_over_all_bounds_is_left_out_from_the_largest_down():
    items = {"small": "s", "huge": "h" * (40 << 20), "large": "l" * (20 << 20), "medium": "m" * (15 << 20)}
    job, _, notes = a_job(prompt={"1": "p"}, extra_pnginfo=items)
    assert notes == [
        "extra_pnginfo.huge is left out: it has 41.9 MB",
        "extra_pnginfo.large is left out: it has 21.0 MB",
    ]
    assert list(job.extra_pnginfo) == ["small", "medium"] and job.prompt == {"1": "p"}
    assert unpack(pack(job, {}))[0]["extra_pnginfo"].keys() == {"small", "medium"}


def test_what_json_does_not_have_is_left_out_item_by_item():
    loop: list = []
    loop.append(loop)
    given = {
        "tuple": (1, (2, 3)),
        "numbers": [np.float32(0.5), np.int64(3), enum.IntEnum("Mode", "A").A, 2**100],
        "object": {"kept": [1, object(), 3]},
        "half\ud83d": "\ud83d",
        5: "number for a key",
        "loop": loop,
        "keys": {(1, 2): 3},
        "\u65e5": "no PNG keyword",
    }
    job, _, notes = a_job(prompt={"1": {"inputs": {"mode": enum.auto, "steps": 3}}}, extra_pnginfo=given)
    assert job.prompt == {"1": {"inputs": {"mode": None, "steps": 3}}}
    assert job.extra_pnginfo == {
        "tuple": [1, [2, 3]],
        "numbers": [0.5, 3, 1, 2**100],
        "object": {"kept": [1, None, 3]},
        "half?": "?",
        "5": "number for a key",
        "loop": None,
        "keys": None,
    }
    assert sorted(notes) == [
        "extra_pnginfo.keys is left out: it holds itself, is nested too deeply, or has keys that are no texts",
        "extra_pnginfo.loop is left out: it holds itself, is nested too deeply, or has keys that are no texts",
        "extra_pnginfo.object holds something that is left out: object has no form in JSON",
        "extra_pnginfo.\u65e5 is left out: pictures take only short names in Latin letters",
        "prompt holds something that is left out: type has no form in JSON",
    ]


@pytest.mark.parametrize("depth", [300, 20_000])
def test_what_is_nested_too_deeply_is_left_out(depth):
    deep: list = []
    for _ in range(depth):
        deep = [deep]
    job, _, notes = a_job(prompt={"1": deep}, extra_pnginfo={"deep": deep, "workflow": {}})
    assert job.prompt is job.extra_pnginfo.get("deep") is None and job.extra_pnginfo["workflow"] == {}
    assert sorted(note.split(" ")[0] for note in notes) == ["extra_pnginfo.deep", "prompt"]
    unpack(pack(job, {}))


def test_settings_out_of_range_take_their_defaults():
    job, _, notes = a_job(lossy_quality=50, priority=7, custom_metadata="c" * 200_000, metadata="no dictionary")
    assert (job.lossy_quality, job.priority, job.custom_metadata, job.metadata) == (90, 7, "", {})
    assert sorted(note.split(" ")[0] for note in notes) == ["custom_metadata", "lossy_quality", "metadata"]
