"""The answer to one request, as HTTP has it; the engine's door and TorchServe carry the same."""

from dataclasses import dataclass

from luna_protocol import JSON
from luna_protocol.errors import LunaError


@dataclass(frozen=True)
class Answer:
    """reason: the status's phrase. retry_after: seconds after which trying again makes sense, or None."""

    status: int
    content_type: str
    body: bytes | bytearray
    reason: str = ""
    retry_after: float | None = None

    @classmethod
    def of_error(cls, error: LunaError) -> "Answer":
        return cls(error.status, JSON, error.to_json(), type(error).__name__, error.retry_after)
