"""A save job of whatever a workflow holds: what cannot travel or be written is left out, and named."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from luna_pictures.metadata import plain
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
        fields[name] = {plain(str(key)): value for key, value in given.items()}
    places = [
        ("prompt", fields, "prompt"),
        *((f"{name}.{key}", fields[name], key) for name in _HELD for key in fields[name]),
    ]
    for label, holder, key in places:
        holder[key] = _json(holder.get(key), label[:100], notes)
    sizes = {label: len(json.dumps(holder[key])) for label, holder, key in places}
    for label, holder, key in sorted(places, key=lambda place: -sizes[place[0]]):
        if sum(sizes.values()) > _MAX_METADATA_BYTES:
            notes.append(f"{label[:100]} is left out: it has {sizes.pop(label) / 1e6:.1f} MB")
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
            reason = "pictures take only short names in Latin letters" if wrong["loc"][-1] == "[key]" else wrong["msg"]
            notes.append(f"{'.'.join(dict.fromkeys((name, str(key))))[:100]} is left out: {reason}")
            del holder[key]


def _json(value: Any, label: str, notes: list[str]) -> Any:
    """`value` as JSON has it: tuples become lists, keys texts, and what has no such form None."""

    def without_form(part: Any) -> Any:
        if isinstance(part, np.generic):
            return part.item()
        notes.append(f"{label} holds something that is left out: {type(part).__name__} has no form in JSON")
        return None

    try:
        text = json.dumps(value, default=without_form, ensure_ascii=False)
    except (RecursionError, TypeError, ValueError):
        notes.append(f"{label} is left out: it holds itself, is nested too deeply, or has keys that are no texts")
        return None
    return json.loads(text.encode(errors="replace"))
