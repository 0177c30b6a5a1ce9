"""A database row per saved picture, in SQLite or, by URL, in PostgreSQL."""

import math
from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    delete,
    insert,
)

from engine.saving.database import open_database
from luna_pictures.encoding import EXTENSIONS
from luna_pictures.metadata import model_texts, plain
from luna_protocol.save_job import PictureGroup, SaveJob

SCHEMA = MetaData()

# What the generation's metadata is known to hold. A seed has up to 64 bits, one more than a database's integers.
_TEXTS = ("model", "positive", "positive_clean", "negative", "negative_clean", "seed", "sampler", "sampler_name")
_TEXTS += ("scheduler", "fb_cache_range")
_INTEGERS = ("steps", "clip_skip", "batch_size", "lora_count")
_NUMBERS = ("cfg", "denoise")

PICTURES = Table(
    "luna_pictures",
    SCHEMA,
    Column("job_id", String(64), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("client", String(64), nullable=False, index=True),
    Column("created", Double, nullable=False, index=True),
    Column("path", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("format", String(8), nullable=False),
    Column("image_type", Text, nullable=False),
    Column("batch_index", Integer, nullable=False),
    Column("discarded", Boolean, nullable=False),
    Column("quality", Double),
    Column("model_name", Text, index=True),
    Column("model_path", Text),
    *(Column(name, Text) for name in _TEXTS),
    *(Column(name, BigInteger) for name in _INTEGERS),
    *(Column(name, Double) for name in _NUMBERS),
    Column("fb_cache_enabled", Boolean),
    Column("loras", JSON),
    Column("metadata", JSON, nullable=False),
    Column("custom_metadata", Text, nullable=False),
    Column("prompt", JSON),
    Column("extra_pnginfo", JSON, nullable=False),
    Column("workflow", JSON),
    Column("heatmaps", JSON, nullable=False),
)


class PictureRecords:
    """The pictures' table in the database at `url`."""

    def __init__(self, url: str):
        self.engine = open_database(url, SCHEMA)

    def store(self, job: SaveJob, pictures: Sequence[Row], heatmaps: str | None) -> None:
        """Writes the rows of a job in one transaction; done again, they are the same.

        Args:
            pictures: rows of the queue's files, in order.
            heatmaps: path of the job's heatmaps under the output root, where it has some.
        """
        shared = _job_fields(job, heatmaps)
        rows = [shared | _picture_fields(picture, job.groups[picture.group]) for picture in pictures]
        with self.engine.begin() as db:
            db.execute(delete(PICTURES).where(PICTURES.c.job_id == job.job_id))
            db.execute(insert(PICTURES), rows)

    def close(self) -> None:
        self.engine.dispose()


def _picture_fields(file: Row, group: PictureGroup) -> dict[str, Any]:
    return {
        "position": file.position,
        "path": file.path,
        "sha256": file.sha256,
        "bytes": file.bytes,
        "width": file.width,
        "height": file.height,
        "format": group.format if file.path.endswith(EXTENSIONS[group.format]) else "png",
        "image_type": plain(group.affix),
        "batch_index": file.row,
        "discarded": file.discarded,
        "quality": file.quality,
    }


def _job_fields(job: SaveJob, heatmaps: str | None) -> dict[str, Any]:
    given = job.metadata
    return {
        "job_id": job.job_id,
        "client": plain(job.client),
        "created": job.created,
        **model_texts(job),
        **{name: None if given.get(name) is None else plain(str(given[name])) for name in _TEXTS},
        **{name: _integer(given.get(name)) for name in _INTEGERS},
        **{name: _number(given.get(name)) for name in _NUMBERS},
        "fb_cache_enabled": given["fb_cache_enabled"] if isinstance(given.get("fb_cache_enabled"), bool) else None,
        "loras": _json(given.get("loras")),
        "metadata": _json(given),
        "custom_metadata": plain(job.custom_metadata),
        "prompt": _json(job.prompt),
        "extra_pnginfo": _json(job.extra_pnginfo),
        "workflow": _json(job.extra_pnginfo.get("workflow")),
        "heatmaps": [{"path": heatmaps, **part.model_dump()} for part in job.heatmaps],
    }


def _integer(value: JsonValue) -> int | None:
    number = _number(value)
    return int(number) if number is not None and abs(number) < 2**53 else None


def _number(value: JsonValue) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _json(value: JsonValue) -> JsonValue:
    """`value` as every database's JSON takes it: no NaN, no infinity, no NUL, no half characters."""
    match value:
        case str():
            return plain(value)
        case float() if not math.isfinite(value):
            return None
        case list():
            return [_json(item) for item in value]
        case dict():
            return {plain(key): _json(item) for key, item in value.items()}
    return value
