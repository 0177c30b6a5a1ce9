"""What the engine's roles share: what a request is, and what a role defines to answer it.

A role is one model's code: it loads, checks and runs. The scheduler calls it, from one thread, with requests of several
clients that fit together; what one client sends never fails another's request.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from engine.checkpoints import weights_size
from engine.lora.overlays import Stack
from engine.served_file import ServedFile
from engine.settings import HandlerSettings
from engine.tensor_cache import TensorCache
from engine.weights import Weights, compute_dtype
from luna_protocol.errors import Impossible, Malformed
from luna_protocol.messages import Message, Missing, Request

R = TypeVar("R", bound=Request)


@dataclass
class Item(Generic[R]):
    """One client's request with its tensors, as they came: on the CPU, in memory that is the client's again once it has
    its reply; what is kept for longer has to be cloned. `stack` is its LoRAs, for roles that take some."""

    request: R
    tensors: dict[str, Tensor]
    stack: Stack = field(default_factory=Stack)

    def take(self, name: str, ndim: int, floating: bool = True) -> Tensor:
        """The tensor `name`, which must have `ndim` dimensions, of a floating dtype or of an integer one.

        Raises:
            Malformed: it was not sent.
            Impossible: it has other dimensions, or the other kind of dtype.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            sent = ", ".join(sorted(self.tensors)) or "none"
            raise Malformed(f"the tensor {name!r} is missing", f"sent were: {sent}")
        if tensor.ndim != ndim:
            raise Impossible(f"{name} has shape {list(tensor.shape)}", f"it needs {ndim} dimensions")
        if tensor.is_floating_point() != floating or tensor.dtype == torch.bool:
            raise Impossible(f"{name} is {str(tensor.dtype)[6:]}", f"send {'float32' if floating else 'int64'}")
        return tensor


@dataclass
class Reply:
    """A message, its tensors, by how much this request raises counters that metrics.yaml declares, bytes that gauges of
    it show from now on, and its status."""

    message: Message
    tensors: dict[str, Tensor]
    counters: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    status: int = 200


@dataclass
class Surroundings:
    """What the engine gives a role to work with.

    between_blocks: to be called between a forward's blocks; raises where nobody waits for the result any longer.
    compute: runs a function on the compute thread when nobody else's request waits, and returns what it returns.
    observe: takes a metric's name, value, unit and kind ("counter", "gauge", "histogram"), from any thread.
    """

    between_blocks: Callable[[], None] = lambda: None
    compute: Callable = lambda function: function()
    observe: Callable[[str, float, str, str], None] = lambda name, value, unit, kind: None


class Role:
    """One served model; subclasses say what they accept, load and run.

    Args:
        name: of the served model.
        settings: its archive's.
        device: where it computes.

    Attributes:
        file: what it was loaded from.
    """

    accepts: tuple[type[Request], ...] = ()
    file: ServedFile | None = None

    def __init__(self, name: str, settings: HandlerSettings, device: torch.device) -> None:
        self.name, self.settings, self.device = name, settings, device
        self.dtype = compute_dtype(settings.role, settings.dtype, device)
        self.around = Surroundings()
        self.tensors = TensorCache(settings.tensor_cache_mb << 20)
        self.weights = Weights()

    def expected_bytes(self) -> int:
        """How many bytes the weights will take of the device, from the header of the file, which becomes `file`.

        Raises:
            LunaError: the file cannot be served.
        """
        path = self.settings.checkpoint_path()
        self.file = ServedFile(path, self.settings.family)
        return weights_size(path, self.settings.role, self.dtype.itemsize)

    def load(self) -> None:
        """Loads what the role serves, and names its weights in `self.weights`. Any thread may call it."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Runs once what requests will run, in small: kernels, libraries' caches and mapped weights are then in
        place."""

    def open(self) -> None:
        """Begins what the role does besides answering, once it can."""

    def close(self) -> None:
        """Ends what `open` began."""

    def caches_bytes(self) -> int:
        """Bytes of the device that `drop_caches` would free."""
        return 0

    def drop_caches(self) -> None:
        """Frees what only saves time: the next requests make it again."""

    def answers_at_once(self, request: Request) -> bool:
        """Whether `run` needs no device for this request, and may be called from any thread."""
        return False

    def missing(self, item: Item) -> list[str]:
        """Content hashes, beside those of `references`, that the client has to send first."""
        return []

    def check(self, item: Item) -> None:
        """Raises what is wrong with this request before it may join others."""

    def group_key(self, item: Item) -> Hashable:
        """Requests with equal keys run together; by default each alone."""
        return id(item)

    def batch_size(self, item: Item) -> int:
        """What this request adds to a group, of which at most `settings.batch_positions` run together."""
        return 0

    def run(self, items: list[Item]) -> list[Reply]:
        """Replies to requests of one group, in their order."""
        raise NotImplementedError

    def admit(self, item: Item) -> Reply | None:
        """Looks up what the request names by hashes, and checks it. A reply, if that is all there is to do.

        Raises:
            LunaError: what is wrong with it.
        """
        missing = self.missing(item)
        for name, key in item.request.references.items():
            if name in item.tensors:
                self.tensors.put(key, item.tensors[name])
            elif (kept := self.tensors.get(key)) is not None:
                item.tensors[name] = kept
            else:
                missing.append(key)
        if missing:
            return Reply(Missing(hashes=missing), {})
        self.check(item)
        return None
