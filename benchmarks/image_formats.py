"""What a picture costs to save: our PNG against Pillow's, and the other formats, for a photo-like megapixel.

Also whether other threads run meanwhile: how much a thread that only counts is slowed by another that encodes.
"""

import io
import threading
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from benchmarks._bench import arguments, conclude, in_turns, median_ms, show
from luna_pictures.encoding import encode
from luna_protocol.save_job import PictureGroup, SaveJob


def photo(size: int) -> np.ndarray:
    """[size, size, 3] uint8: noise of many scales, as in landscapes, and a little grain."""
    rng = np.random.default_rng(0)
    picture = np.zeros((size, size, 3), np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256, 512):
        for channel in range(3):
            noise = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
            picture[..., channel] += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) / cells**0.9
    picture = (picture - picture.min()) / np.ptp(picture) * 255 + rng.normal(scale=1.5, size=picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    picture = photo(1024)
    image = Image.fromarray(picture)

    def ours(picture_format: str, **settings) -> Callable[[], bytes]:
        group = PictureGroup(source="image", tensor="x", format=picture_format)
        job = SaveJob(job_id="benchmark", groups=[group], created=0, **settings)
        return lambda: encode(picture, job, group, 0)

    def pillow(level: int) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=level)
        return file.getvalue()

    ways = {
        **{f"png, level {level}": ours("png", png_compression=level) for level in (0, 1, 4)},
        "png by Pillow, level 1": lambda: pillow(1),
        "png by Pillow, level 4": lambda: pillow(4),
        "png of 16 bits, level 4": ours("png16"),
        "webp, quality 90": ours("webp"),
        "webp, lossless": ours("webp", lossless_webp=True),
        "jpeg, quality 90": ours("jpeg"),
    }
    seconds = in_turns(ways, 3 if options.quick else 10, 1, warm_up=1)
    free = count_per_second(None)
    rows = [
        [name, median_ms(seconds[name]), len(way()) / 1024, count_per_second(way) / free] for name, way in ways.items()
    ]
    show("1024 x 1024, photo-like", ["", "ms", "KiB", "what another thread keeps of its speed"], rows)
    conclude(
        {
            "png_4_ms": rows[2][1],
            "pillow_4_ms": rows[4][1],
            "speed_up": rows[4][1] / rows[2][1],
            "size_ratio": rows[2][2] / rows[4][2],
        }
    )


def count_per_second(way: Callable[[], bytes] | None) -> float:
    """How fast a thread counts while another repeats `way`."""
    stop = threading.Event()

    def repeat() -> None:
        while way and not stop.is_set():
            way()

    thread = threading.Thread(target=repeat)
    thread.start()
    count, until = 0, time.perf_counter() + 0.5
    while time.perf_counter() < until:
        count += 1
    stop.set()
    thread.join()
    return count / 0.5


if __name__ == "__main__":
    main()
