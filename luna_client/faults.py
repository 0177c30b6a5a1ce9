"""What can go wrong between a client and a server, as `LunaError`s, whether our handlers told it or TorchServe did."""

import json

from luna_client.connections import Response
from luna_protocol.errors import (
    Impossible,
    Internal,
    LunaError,
    Malformed,
    NotFound,
    TooLarge,
    Unavailable,
    from_json,
)


class Unreachable(Unavailable):
    """Nothing answers at the server's address, or it stopped answering halfway."""

    code = "unreachable"


class Unauthorized(LunaError):
    """The server wants a token that we do not have."""

    status, code = 401, "unauthorized"


class TokenKeptBack(Unauthorized):
    """The server wants a token, and its address is not one that may see it."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"{address} asks for a token and gets none, as it is another machine's and comes from ComfyUI's settings",
            "name it in the environment, LUNA_INFERENCE or LUNA_MANAGEMENT, if it may have the token",
        )


class Aborted(LunaError):
    """Another thread of this client ended the call."""

    code = "aborted"


class WorkerDied(Internal):
    """The worker ended while it had the request."""


class NotServed(NotFound):
    """TorchServe has no such model, or no such version of it."""


class Refused(Unavailable):
    """TorchServe itself did not take the request."""


class AlreadyThere(LunaError):
    """A model of that name is registered."""


class DefaultVersion(Impossible):
    """TorchServe does not forget the default version of a model while it has others."""


def token_refused(response: Response) -> bool:
    return response.status == 400 and b"InvalidKeyException" in response.data


def fault(response: Response, model: str, sent: int) -> LunaError:
    """What the server told, ours or TorchServe's."""
    status, retry_after = response.status, response.headers.get("Retry-After", "")
    own = from_json(response.data, float(retry_after) if retry_after.isdecimal() else None)
    if own is not None:
        return own
    try:
        told = str(json.loads(response.data)["message"])
    except (ValueError, KeyError, TypeError):
        told = response.data[:200].decode(errors="replace") or "nothing more"
    if "Worker died" in told:
        return WorkerDied(f"the worker of {model} died on this request", "the server's logs/ have the reason")
    if "Cannot remove default version" in told:
        return DefaultVersion(
            f"{model} is the default of several versions",
            "scripts/models.py set-default NAME OTHER makes it an ordinary one",
        )
    match status:
        case 400:
            return Malformed(f"TorchServe refuses the request for {model}: {told}")
        case 401 | 403:
            return Unauthorized(f"the proxy refuses the token: {told}", "LUNA_TOKEN holds what it asks for")
        case 404:
            return NotServed(told, "scripts/add_checkpoint.py packs and registers a checkpoint")
        case 405:
            return Impossible(f"the server does not allow this: {told}", "config.properties: enable_model_api=true")
        case 409:
            return AlreadyThere(told)
        case 413:
            return TooLarge(
                f"{sent} bytes are more than the server takes over HTTP",
                "send less at once, raise max_request_size in config.properties, or run where the server does: there, "
                "shared memory carries tensors",
            )
        case 503:
            return Refused(told, retry_after=0.5)
        case 502 | 504:
            return Unreachable(f"a proxy lost the server of {model}: {told}", "is it restarting?", retry_after=0.5)
        case _:
            return Internal(f"TorchServe answers {status} for {model}: {told}", "the server's logs/ have the reason")
