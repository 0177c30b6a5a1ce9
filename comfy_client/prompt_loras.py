"""`<lora:name:weight>` and `<lora:name:weight:clip_weight>` in prompts."""

import re
from dataclasses import dataclass

_TAG = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?(?::([^:<>]*))?>")


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA by name with its strengths for UNet and text encoders."""

    name: str
    strength: float
    strength_clip: float


def split(prompt: str) -> tuple[str, list[LoraChoice]]:
    """The prompt without its tags, and the LoRAs they name in order; a missing weight is 1, a missing clip weight the
    other one.

    Raises:
        ValueError: a weight is no number.
    """
    loras = []
    for tag in _TAG.finditer(prompt):
        name, weight, clip_weight = tag.groups()
        strength = _number(weight, 1.0, tag[0])
        loras.append(LoraChoice(name.strip(), strength, _number(clip_weight, strength, tag[0])))
    if not loras:
        return prompt, []
    return re.sub(r"[ \t]{2,}", " ", _TAG.sub("", prompt)).strip(" ,"), loras


def _number(text: str | None, default: float, tag: str) -> float:
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"{text!r} in {tag} is no number; write <lora:name:weight> or <lora:name:weight:clip>"
        ) from None
