"""What can go wrong, each with its HTTP status: raised on the server, sent as JSON, raised again on the client."""

import json

MAX_TEXT = 2000


class LunaError(Exception):
    """A fault that its reader can act on.

    Args:
        message: what was wrong, with the offending value; like `hint`, its middle is left out beyond `MAX_TEXT`
            characters.
        hint: what would be right.
        retry_after: seconds after which trying again makes sense, or None.
    """

    status = 500
    code = "internal"

    def __init__(self, message: str, hint: str = "", retry_after: float | None = None):
        self.message, self.hint = message, hint = _bounded(message), _bounded(hint)
        super().__init__(f"{message} ({hint})" if hint else message)
        self.retry_after = retry_after

    def fresh(self) -> "LunaError":
        """The same fault without a traceback: one object raised again and again keeps every request's frames."""
        return type(self)(self.message, self.hint, self.retry_after)

    def to_json(self) -> bytes:
        body = {"code": self.code, "type": type(self).__name__, "message": self.message, "hint": self.hint}
        return json.dumps(body).encode()


def _bounded(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    left_out = f" [... {len(text) - MAX_TEXT} characters left out ...] "
    half = (MAX_TEXT - len(left_out)) // 2
    return text[:half] + left_out + text[-half:]


class Malformed(LunaError):
    """The request cannot be read: not the protocol, a missing tensor, an unknown field."""

    status, code = 400, "malformed"


class NotFound(LunaError):
    """A model, LoRA, job or file that the server does not have."""

    status, code = 404, "not_found"


class NotLoaded(NotFound):
    """An engine does not have the model, or no longer."""

    code = "not_loaded"


class VersionMismatch(LunaError):
    """Client and server speak different versions of the protocol."""

    status, code = 409, "version"


class TooLarge(LunaError):
    """More bytes or elements than the server accepts."""

    status, code = 413, "too_large"


class Impossible(LunaError):
    """Readable, but no such thing can be computed: wrong width, NaN sigma, start >= end."""

    status, code = 422, "impossible"


class NoSharedMemory(LunaError):
    """This worker cannot map the client's memory (another machine, container or user): send the blob as the body."""

    status, code = 422, "no_shared_memory"


class Unavailable(LunaError):
    """Loading, full or gone; worth trying again after `retry_after` seconds."""

    status, code = 503, "unavailable"


class Loading(Unavailable):
    """The model's workers are starting."""

    code = "loading"


class EngineEnded(Unavailable):
    """The process that computed ended on this request; another is started."""

    code = "engine_ended"


class Full(Unavailable):
    """The model works, and as many requests as its queue takes wait already."""

    code = "full"


class Broken(Unavailable):
    """The model did not load; trying again does not help before somebody mends it."""

    code = "broken"


class OutOfMemory(LunaError):
    """The device has no room for this request; a smaller one may fit."""

    status, code = 507, "out_of_memory"


class Internal(LunaError):
    """A fault of the server's own; its log has the traceback."""


_BY_CODE = {
    kind.code: kind
    for kind in (
        Malformed,
        NotFound,
        NotLoaded,
        VersionMismatch,
        TooLarge,
        Impossible,
        NoSharedMemory,
        Unavailable,
        Loading,
        EngineEnded,
        Full,
        Broken,
        OutOfMemory,
        Internal,
    )
}


def from_json(body: bytes, retry_after: float | None = None) -> LunaError | None:
    """The error that `to_json` wrote, or None when `body` is something else (TorchServe's own pages, say)."""
    try:
        fields = json.loads(body)
        kind = _BY_CODE[fields["code"]]
        return kind(str(fields["message"]), str(fields.get("hint", "")), retry_after)
    except (ValueError, KeyError, TypeError):
        return None
