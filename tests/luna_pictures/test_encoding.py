"""Every format holds the picture and the metadata that ComfyUI and the origin's users look for."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from luna_pictures.encoding import encode, thumbnail, to_8_bits
from luna_pictures.metadata import jpeg_exif
from luna_pictures.plan import warnings
from luna_pictures.png import png
from luna_protocol.save_job import PictureGroup, SaveJob

PROMPT = {"3": {"class_type": "KSampler", "inputs": {"seed": 7, "text": 'quote " and é'}}}
WORKFLOW = {"nodes": [{"id": 1, "title": "日本"}], "version": 0.4}


def a_job(picture_format: str, **fields) -> tuple[SaveJob, PictureGroup]:
    group = PictureGroup(source="image", tensor="x", affix="FINAL", format=picture_format)
    given = {"prompt": PROMPT, "extra_pnginfo": {"workflow": WORKFLOW, "extra": [1]}, "metadata": {"model": "a/b.st"}}
    return SaveJob(job_id="job-0001", groups=[group], created=1e9, **(given | fields)), group


def a_picture(channels: int = 3) -> np.ndarray:
    y, x = np.mgrid[0:48, 0:64].astype(np.float32)
    waves = [0.5 + 0.5 * np.sin(x / (3 + c) + y / (7 + c)) for c in range(channels)]
    return np.stack(waves, axis=-1).astype(np.float32)


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("level", range(10))
def test_png_of_every_level_holds_the_exact_pixels(level, channels):
    job, group = a_job("png", png_compression=level)
    image = opened(encode(a_picture(channels), job, group, 0))
    assert np.array_equal(np.asarray(image), to_8_bits(a_picture(channels)))


def test_compression_compresses():
    large = np.tile(a_picture(), (8, 8, 1))
    stored, fast, default = [len(encode(large, *a_job("png", png_compression=level), 0)) for level in (0, 1, 4)]
    assert stored > 2 * fast > 2 * default


def test_pixels_are_rounded_as_comfyui_rounds_them():
    # SaveImage: numpy.clip(255 * x, 0, 255).astype(uint8), which rounds down.
    ramp = np.linspace(-0.2, 1.2, 64 * 3 * 5, dtype=np.float32).reshape(5, 64, 3)
    assert np.array_equal(to_8_bits(ramp), np.clip(255.0 * ramp, 0, 255).astype(np.uint8))


def test_16_bits_keep_what_8_bits_lose():
    fine = np.linspace(0, 1, 65_536, dtype=np.float32).reshape(256, 256, 1).repeat(3, axis=2)
    content = encode(fine, *a_job("png16"), 0)
    assert content[24] == 16, "the depth in the header"
    assert np.array_equal(samples_of(content), np.arange(65_536).reshape(256, 256))


def samples_of(content: bytes) -> np.ndarray:
    """The red channel of a 16-bit PNG by the specification: Pillow keeps only 8 bits of 16-bit colour."""
    import zlib

    from PIL.PngImagePlugin import ChunkStream

    data, stream = b"", ChunkStream(io.BytesIO(content[8:]))
    while True:
        kind, _, length = stream.read()
        body = stream.fp.read(length)
        stream.crc(kind, body)
        if kind == b"IDAT":
            data += body
        if kind == b"IEND":
            break
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(256, -1)
    assert (rows[:, 0] == 2).all(), "filter type Up"
    plain = np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(256, 256, 6)
    return plain[..., 0].astype(int) * 256 + plain[..., 1]


def test_png_has_the_workflow_where_comfyui_looks_for_it():
    for level in (4, 6):
        texts = opened(encode(a_picture(), *a_job("png", png_compression=level), 2)).text
        assert json.loads(texts["prompt"]) == PROMPT
        assert json.loads(texts["workflow"]) == WORKFLOW
        assert json.loads(texts["extra"]) == [1]
        assert json.loads(texts["generation_metadata"]) == {"model": "a/b.st"}
        assert (texts["image_type"], texts["model_name"], texts["model_path"]) == ("FINAL", "b", "a/b")
        assert texts["batch_index"] == "2" and texts["save_timestamp"].startswith("2001-09-")


def test_text_that_is_not_latin_becomes_an_international_chunk():
    content = png(to_8_bits(a_picture()), 4, {"plain": "café", "wide": "日本"})
    assert b"tEXtplain\0caf\xe9" in content and b"iTXtwide\0" in content
    assert opened(content).text == {"plain": "café", "wide": "日本"}


@pytest.mark.parametrize("picture_format", ["webp", "jpeg"])
def test_exif_holds_prompt_in_model_and_the_rest_from_make_downwards(picture_format):
    tags = opened(encode(a_picture(), *a_job(picture_format), 0)).getexif()
    assert json.loads(tags[0x0110].removeprefix("prompt:")) == PROMPT
    assert json.loads(tags[0x010F].removeprefix("workflow:")) == WORKFLOW
    assert tags[0x010E] == "extra:[1]"
    comment = tags.get_ifd(0x8769)[0x9286]
    assert json.loads(comment.removeprefix(b"ASCII\0\0\0"))["image_type"] == "FINAL"


@pytest.mark.parametrize("picture_format", ["png", "png16", "webp", "jpeg"])
def test_switches_leave_the_workflow_or_all_metadata_out(picture_format):
    secret = {"prompt": "s3cret-prompt", "extra_pnginfo": {"workflow": "s3cret-flow"}}
    for fields, gone in (
        ({"embed_workflow": False}, [b"s3cret"]),
        ({"embed_metadata": False}, [b"s3cret", b"FINAL", b"b.st", b"tEXt", b"Exif"]),
    ):
        content = encode(a_picture(), *a_job(picture_format, **secret, **fields), 0)
        assert not [word for word in gone if word in content]
    assert b"s3cret-flow" in encode(a_picture(), *a_job(picture_format, **secret), 0)


def test_lossless_webp_is_lossless_and_quality_counts():
    exact = opened(encode(a_picture(), *a_job("webp", lossless_webp=True), 0))
    assert np.array_equal(np.asarray(exact), to_8_bits(a_picture()))
    for picture_format in ("webp", "jpeg"):
        small, large = (
            len(encode(a_picture(), *a_job(picture_format, lossy_quality=quality), 0)) for quality in (70, 100)
        )
        assert small < large


def test_a_workflow_too_large_for_jpeg_is_left_out_and_said_so():
    job, group = a_job("jpeg", extra_pnginfo={"workflow": "w" * 70_000})
    assert "64 KB" in warnings(job)[0]
    tags = opened(encode(a_picture(), job, group, 0)).getexif()
    assert 0x010F not in tags and b"FINAL" in tags.get_ifd(0x8769)[0x9286]
    assert warnings(a_job("jpeg")[0]) == []
    assert jpeg_exif({}, {"custom_metadata": "c" * 70_000})[0] == b""


def test_more_items_than_text_tags_go_into_the_comment():
    many = {f"item{n}": n for n in range(9)}
    tags = opened(encode(a_picture(), *a_job("webp", extra_pnginfo=many), 0)).getexif()
    assert [tags[tag] for tag in (0x010F, 0x010B)] == ["item0:0", "item4:4"]
    assert b'"item8": "8"' in tags.get_ifd(0x8769)[0x9286]


def test_images_sent_as_bytes_are_saved_as_they_are():
    sent = to_8_bits(a_picture())
    assert np.array_equal(np.asarray(opened(encode(sent, *a_job("png"), 0))), sent)


def test_a_thumbnail_fits_256_pixels():
    large = np.zeros((1200, 2000, 3), np.float32)
    assert max(opened(thumbnail(large)).size) == 256
