"""A save job of whatever a workflow holds: what cannot travel or be written is left out, and named."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from luna_protocol.blob import MAX_MESSAGE_BYTES
from luna_protocol.save_job import SaveJob

_HELD = ("extra_pnginfo", "metadata")
_MAX_METADATA_BYTES = MAX_MESSAGE_BYTES - (1 << 20)


def tolerant_job(fields: Mapping[str, Any]) -> tuple[SaveJob, list[str]]:
    """The job of these fields of `SaveJob`, and one sentence for each that was left out.

    Metadata goes item by item: what has no form in JSON, and the largest items where all are too large. Settings out of
    their range take their defaults.

    Raises:
        ValidationError: a field that every job needs.
    """
    fields, notes = dict(fields), []
    for name in _HELD:
        given = fields.get(name) or {}
        if not isinstance(given, Mapping):
            notes.append(f"{name} is left out: {type(given).__name__} is no dictionary")
            given = {}
        fields[name] = {_plain(str(key), name, notes): value for key, value in given.items()}
    places = [("", fields, "prompt"), *((f"{name}.", fields[name], key) for name in _HELD for key in fields[name])]
    sizes = []
    for prefix, holder, key in places:
        try:
            holder[key] = _plain(holder.get(key), f"{prefix}{key}", notes)
        except RecursionError:
            holder[key] = None
            notes.append(f"{prefix}{key} is left out: it holds itself")
        sizes.append(len(json.dumps(holder[key])))
    for size, (prefix, holder, key) in sorted(zip(sizes, places, strict=True), key=lambda each: -each[0]):
        if sum(sizes) > _MAX_METADATA_BYTES:
            notes.append(f"{prefix}{key} is left out: it has {size / 1e6:.1f} MB")
            sizes.remove(size)
            del holder[key]
    while True:
        try:
            return SaveJob(**fields), notes
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            name, *inner = wrong["loc"] or ("",)
            if name not in fields or SaveJob.model_fields[name].is_required():
                raise
            # pydantic's places lead into the value: what goes is the item, or the whole field.
            holder, key = (fields[name], inner[0]) if name in _HELD and inner else (fields, name)
            notes.append(f"{'.'.join(dict.fromkeys((name, str(key))))[:100]} is left out: {wrong['msg']}")
            del holder[key]


def _plain(value: Any, label: str, notes: list[str]) -> Any:
    """`value` as JSON has it: tuples become lists, keys texts, and what has no such form None."""
    match value:
        case None | bool():
            return value
        case np.generic():
            return _plain(value.item(), label, notes)
        case int():
            return int(value)
        case float():
            return float(value)
        case str():
            return value.encode(errors="replace").decode()
        case Mapping():
            return {
                _plain(str(key), label, notes): _plain(part, f"{label}.{key}", notes) for key, part in value.items()
            }
        case list() | tuple() | set():
            return [_plain(part, f"{label}.{number}", notes) for number, part in enumerate(value)]
    notes.append(f"{label[:100]} is left out: {type(value).__name__} has no form in JSON")
    return None
