"""archive_specs/*.yaml, typed: where the workers of a role run and how they batch."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, create_model

from engine.settings import SETTINGS

FOLDER = Path(__file__).resolve().parent.parent / "archive_specs"
# What add_checkpoint.py knows and a spec therefore does not say.
_OF_ARCHIVE = ("role", "home", "family", "checkpoint", "further", "clip_type", "checkpoint_roots")


class SpecError(ValueError):
    """A spec that cannot be used; the message names file, key and choices."""


def _devices(value: Any) -> list[int] | Literal["cpu"]:
    if value == "cpu":
        return value
    numbers = isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
    if not numbers or not value or len(set(value)) < len(value):
        raise ValueError("give cpu, or GPU numbers without repeats such as [0, 1]")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Batch(_Section):
    size: int = Field(ge=1, le=64)
    delay_ms: int = Field(ge=1, le=1000)


class Timeouts(_Section):
    answer_s: int = Field(ge=1, le=86400)
    start_s: int = Field(ge=1, le=86400)


class Spec(_Section):
    """A role's spec. `devices` are GPU numbers or "cpu"; `handler` has those of the role's settings that it may set."""

    devices: Annotated[list[int] | Literal["cpu"], PlainValidator(_devices)]
    replicas: int = Field(ge=1, le=64)
    workers: int = Field(ge=1, le=64)
    batch: Batch
    timeouts: Timeouts
    handler: _Section

    def model_config_yaml(self, replica: int) -> dict[str, Any]:
        """TorchServe's keys of model-config.yaml for one replica, counted from 0."""
        if self.devices == "cpu":
            device = {"deviceType": "cpu"}
        else:
            dealt = self.devices[replica :: self.replicas] or [self.devices[replica % len(self.devices)]]
            device = {"deviceType": "gpu", "deviceIds": dealt}
        return {
            "minWorkers": self.workers,
            "maxWorkers": self.workers,
            "batchSize": self.batch.size,
            "maxBatchDelay": self.batch.delay_ms,
            "responseTimeout": self.timeouts.answer_s,
            "startupTimeout": self.timeouts.start_s,
            **device,
        }


def _spec_type(role: str) -> type[Spec]:
    fields = {n: (f.annotation, f) for n, f in SETTINGS[role].model_fields.items() if n not in _OF_ARCHIVE}
    handler = create_model("Handler", __base__=_Section, **fields)
    return create_model("Spec", __base__=Spec, handler=(handler, handler()))


_SPECS = {role: _spec_type(role) for role in SETTINGS}


def load_spec(role: str, folder: Path = FOLDER) -> Spec:
    """The spec of a role.

    Raises:
        SpecError: naming every wrong key and value, what it was, and what it may be.
    """
    path = folder / f"{role}.yaml"
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _SPECS[role].model_validate(fields)
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        raise SpecError("\n".join(f"{path}: {_told(each, _SPECS[role])}" for each in error.errors())) from error


def _told(error: dict[str, Any], model: type[BaseModel]) -> str:
    *section, key = error["loc"] or ("",)
    for name in section:
        model = model.model_fields[name].annotation
    where = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            known = list(model.model_fields)
            return f"unknown key {where!r}{_nearest(key, known)}; the keys here are {', '.join(known)}"
        case "missing":
            return f"the key {where!r} is missing"
        case "literal_error":
            given, choices = error["input"], model.model_fields[key].annotation.__args__
            return f"{where} is {given!r}{_nearest(given, choices)}; the choices are {', '.join(choices)}"
        case _:
            return f"{where or 'the file'} is {error['input']!r}: {error['msg']}"


def _nearest(given: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(given), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
