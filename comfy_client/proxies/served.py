"""Proxies for checkpoints by file name: has the server load what it has not, and keeps what was made."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from comfy.utils import ProgressBar

from comfy_client.catalog import find
from comfy_client.proxies.clip import remote_clip
from comfy_client.proxies.model import remote_model
from comfy_client.proxies.remote import Remote, interruptible
from comfy_client.proxies.vae import RemoteVAE
from comfy_client.server import Server
from luna_protocol.errors import Unavailable
from luna_protocol.messages import ServedModel

_PROXIES: dict[str, Callable[[Remote], Any]] = {"unet": remote_model, "clip": remote_clip, "vae": RemoteVAE}


def served(server: Server, checkpoints: dict[str, str]) -> dict[str, Any]:
    """{role: MODEL, CLIP or VAE} for {role ("unet", "clip", "vae"): checkpoint file}.

    Models that the server has not loaded are registered first, with ComfyUI's progress bar and cancel button.

    Raises:
        NotFound: the server's store does not have one of them.
        Unavailable: a worker did not start; the message has its reason.
        InterruptProcessingException: the user cancelled.
    """
    models = _found(server, checkpoints)
    absent = [model.name for model in models.values() if not model.workers]
    if absent:
        _load(server, absent)
        models = _found(server, checkpoints)
    for model in models.values():
        for worker in model.workers:
            if worker.state == "failed":
                raise Unavailable(f"{model.name} did not start: {worker.reason}", "the server's logs/ have the rest")
    return {role: _proxy(server, role, model.name, model.fingerprint, _dtype(model)) for role, model in models.items()}


def _found(server: Server, checkpoints: dict[str, str]) -> dict[str, ServedModel]:
    index = server.index()
    return {role: find(index, role, checkpoint) for role, checkpoint in checkpoints.items()}


def _load(server: Server, names: list[str]) -> None:
    bar = ProgressBar(len(names))

    def load() -> None:
        for name in names:
            server.register(f"{name}.mar")
        for name in names:
            server.wait_ready([name])
            bar.update(1)

    interruptible(load)


def _dtype(model: ServedModel) -> str | None:
    return next((worker.dtype for worker in model.workers), None)


@lru_cache(maxsize=12)
def _proxy(server: Server, role: str, name: str, fingerprint: str | None, dtype: str | None) -> Any:
    """One proxy per model as long as its file and dtype stay what they are; tokenizers take a second to make."""
    return _PROXIES[role](Remote.find(server, name))
