"""Proxies for checkpoints by file name: has the server load what it has not, and keeps what was made."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from comfy.utils import ProgressBar

from comfy_client.catalog import find, replicas
from comfy_client.proxies.clip import remote_clip
from comfy_client.proxies.model import remote_model
from comfy_client.proxies.remote import Remote, interruptible
from comfy_client.proxies.vae import RemoteVAE
from luna_client.server import Server
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
    found = interruptible(lambda: _found(server, checkpoints))
    absent = [model.name for each in found.values() if not any(model.workers for model in each) for model in each]
    if absent:
        _load(server, absent)
        found = _found(server, checkpoints)
    return {role: _proxied(server, role, models) for role, models in found.items()}


def _found(server: Server, checkpoints: dict[str, str]) -> dict[str, list[ServedModel]]:
    """{role: the model and its further replicas}."""
    index = server.index()
    return {role: replicas(index, find(index, role, checkpoint)) for role, checkpoint in checkpoints.items()}


def _load(server: Server, names: list[str]) -> None:
    bar = ProgressBar(len(names))

    def load() -> None:
        for name in names:
            server.load(name)
        for name in names:
            server.wait_ready([name])
            bar.update(1)

    interruptible(load)


def _proxied(server: Server, role: str, models: list[ServedModel]) -> Any:
    first, *others = sorted(models, key=_failed)
    if _failed(first):
        reason = next((worker.reason for worker in first.workers if worker.state == "failed"), "it has no worker")
        raise Unavailable(f"{first.name} did not start: {reason}", "the server's logs/ have the rest")
    names = (first.name, *(model.name for model in others))
    return _proxy(server, role, names, first.fingerprint, first.workers[0].dtype)


def _failed(model: ServedModel) -> bool:
    return not model.workers or any(worker.state == "failed" for worker in model.workers)


@lru_cache(maxsize=12)
def _proxy(server: Server, role: str, names: tuple[str, ...], fingerprint: str | None, dtype: str | None) -> Any:
    """One proxy per model as long as its file and dtype stay what they are; tokenizers take a second to make."""
    return _PROXIES[role](Remote.find(server, names))
