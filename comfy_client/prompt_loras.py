"""`<lora:name:weight>` and `<lora:name:weight:clip_weight>` in prompts, and what other programs put behind these."""

import math
import re
from dataclasses import dataclass

_TAG = re.compile(r"<(?:lora|lyco):([^<>]+)>")


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA by name with its strengths for UNet and text encoders; `ignored`: parts of its tag that ask for more."""

    name: str
    strength: float
    strength_clip: float
    ignored: tuple[str, ...] = ()


def split(prompt: str) -> tuple[str, list[LoraChoice]]:
    """The prompt without its tags, and the LoRAs they name in order.

    A missing weight is 1, a missing clip weight the other one. `unet=` and `te=` give the two by name, as in A1111.

    Raises:
        ValueError: a weight is no number.
    """
    loras = [_choice(tag) for tag in _TAG.finditer(prompt)]
    if not loras:
        return prompt, []
    return re.sub(r"[ \t]{2,}", " ", _TAG.sub("", prompt)).strip(" ,"), loras


def _choice(tag: re.Match) -> LoraChoice:
    name, *parts = map(str.strip, tag[1].split(":"))
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    weight, *others = [part for part in parts if "=" not in part] or [""]
    clip_weight = others.pop(0) if others and (not others[0] or _is_number(others[0])) else ""
    strength = _number(named.pop("unet", weight), 1.0, tag[0])
    strength_clip = _number(named.pop("te", clip_weight), strength, tag[0])
    # Block weights, for instance: as lbw=..., as the name of a preset, or as a list of numbers.
    ignored = [*filter(None, others), *(f"{key}={value}" for key, value in named.items())]
    return LoraChoice(name, strength, strength_clip, tuple(ignored))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(text: str, default: float, tag: str) -> float:
    if not text:
        return default
    if not _is_number(text):
        raise ValueError(f"{text!r} in {tag} is no number; write <lora:name:weight> or <lora:name:weight:clip>")
    return float(text)
