"""LoRA stacks for one forward: merged into copies of the weights they touch, which stand in for them and then go.

The model's own weights are never written. An overlay {parameter: merged weight} costs its merge once, and from then on
the exchange of some references in the modules' `_parameters`.
"""

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock

import psutil
import torch
from torch import nn

from engine.lora import side_path
from engine.lora.files import Lora, LoraFiles, Source
from engine.lora.merge import Scaled, merge
from engine.lora.side_path import LowRank
from luna_protocol.errors import Unavailable
from luna_protocol.messages import LoraUse

FREE_SHARE = 0.3
STACKS = 4  # whole copies of a model's weights that overlays may take, however much is free


@dataclass(frozen=True)
class Use:
    """One LoRA of a stack, as `LoraUse` says it."""

    source: Source
    strength: float = 1.0
    strength_model: float = 1.0


@dataclass(frozen=True)
class Stack:
    """LoRAs in the order in which they are merged; `hooks` into the rounded weights that `loras` made."""

    loras: tuple[Use, ...] = ()
    hooks: tuple[Use, ...] = ()

    @property
    def uses(self) -> tuple[Use, ...]:
        return self.loras + self.hooks


@dataclass(frozen=True)
class Match:
    """How many weights a LoRA patches, {layer: why} of those left out, and its tensors that belong to no layer."""

    patched: int
    skipped: dict[str, str]
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Overlay:
    """What a stack makes of a model: merged weights, or low-rank pairs to run beside them; `matches` in its order."""

    weights: dict[str, nn.Parameter]
    beside: dict[str, LowRank]
    matches: tuple[Match, ...]
    nbytes: int


@dataclass
class Counters:
    """Since the worker's start; `nbytes` is what the overlays hold now, `merge_seconds` what all merging took."""

    merges: int = 0
    hits: int = 0
    evictions: int = 0
    unmerged_forwards: int = 0
    nbytes: int = 0
    merge_seconds: float = 0.0


class Overlays:
    """The overlays of one model, the least recently used dropped beyond the budget.

    One lock holds from the choice of an overlay to the end of the forward in it, so that no forward sees another's, and
    whoever comes meanwhile waits for one merge and one forward at most.

    Args:
        model: its parameters are the base weights.
        files: where patches come from.
        budget: bytes; None for `FREE_SHARE` of the device memory that is free or held by overlays, asked at each merge,
            and at most `STACKS` times the model. The overlay last used stays even when it alone is larger.
    """

    def __init__(self, model: nn.Module, files: LoraFiles, budget: int | None = None):
        self.counters = Counters()
        self._model = model
        self._files = files
        self._fixed_budget = budget
        self._base = dict(model.named_parameters())
        self._weights_bytes = sum(weight.nbytes for weight in self._base.values())
        self._places = {name: _place(model, name) for name in self._base}
        self._overlays: OrderedDict[tuple[Stack, bool], Overlay] = OrderedDict()
        self._lock = RLock()

    def stack(self, lora: Sequence[LoraUse], hook_lora: Sequence[LoraUse] = ()) -> Stack:
        """The stack that a request spells, its files as they are now.

        Raises:
            Malformed, NotFound: for a name that leads out of the LoRA roots, or nowhere.
        """
        return Stack(tuple(map(self._use, lora)), tuple(map(self._use, hook_lora)))

    def receive(self, content: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes LoRA tensors that came with a request; raises as `LoraFiles.receive`."""
        with self._lock:
            self._files.receive(content, tensors)

    def missing(self, stack: Stack) -> list[str]:
        """Content hashes that the client has to send before this stack can run."""
        with self._lock:
            self._files.trim(spare={use.source for use in stack.uses})
            if (stack, True) in self._overlays:
                return []
            sent = dict.fromkeys(use.source for use in stack.uses if use.source.path is None)
            return [source.label for source in sent if self._files.get(source) is None]

    def fit(self, stacks: Iterable[Stack]) -> bool:
        """Whether one overlay for each of these stacks can be held at a time."""
        with self._lock:
            return sum(self._nbytes(stack) for stack in set(stacks)) <= self._budget()

    def mergeless(self, stack: Stack) -> bool:
        """Whether this stack can run beside the weights: plain LoRAs in one stage, no scaling of the weights. One that
        is merged already, and whose tensors are no longer held, cannot."""
        with self._lock:
            if stack.hooks or any(self._files.get(use.source) is None for use in stack.loras):
                return False
            return side_path.can_run(self._model, self._patches(stack.loras))

    @contextmanager
    def merged(self, stack: Stack) -> Iterator[tuple[Match, ...]]:
        """The model with `stack` merged in, for one forward; afterwards it is as before, whatever happened."""
        with self._lock:
            overlay = self._get(stack, merged=True)
            try:
                self._put_in_place(overlay.weights)
                yield overlay.matches
            finally:
                self._put_in_place({name: self._base[name] for name in overlay.weights})

    @contextmanager
    def unmerged(self, rows: Sequence[tuple[Stack, int]]) -> Iterator[list[tuple[Match, ...]]]:
        """The model with each stack beside its own rows of one batch: the first stack's rows come first, and so on."""
        with self._lock:
            overlays = [self._get(stack, merged=False) for stack, _ in rows]
            self.counters.unmerged_forwards += 1
            counts = [count for _, count in rows]
            with side_path.beside(self._model, [overlay.beside for overlay in overlays], counts):
                yield [overlay.matches for overlay in overlays]

    def clear(self) -> None:
        """Drops every overlay; the next forward of each stack merges again."""
        with self._lock:
            self.counters.evictions += len(self._overlays)
            self.counters.nbytes = 0
            self._overlays.clear()

    def _get(self, stack: Stack, merged: bool) -> Overlay:
        key = (stack, merged)
        if key in self._overlays:
            self._overlays.move_to_end(key)
            self.counters.hits += bool(stack.uses)
            return self._overlays[key]
        if not stack.uses:
            return Overlay({}, {}, (), 0)
        started = time.perf_counter()
        overlay = self._merge(stack) if merged else self._low_rank(stack)
        self.counters.merges += merged
        self.counters.merge_seconds += time.perf_counter() - started
        self._overlays[key] = overlay
        self.counters.nbytes += overlay.nbytes
        self._files.trim()
        return overlay

    def _put_in_place(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            parameters, leaf = self._places[name]
            parameters[leaf] = weight

    # No inference mode: a compiled block would take its tensors for another kind than the base's and be compiled anew.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self, stack: Stack) -> Overlay:
        self._make_room(self._nbytes(stack))
        weights: dict[str, torch.Tensor] = {}
        for uses in (stack.loras, stack.hooks):
            for name, patches in self._patches(uses).items():
                weights[name] = merge(weights.get(name, self._base[name]), patches)
        parameters = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
        return Overlay(parameters, {}, self._matches(stack), sum(weight.nbytes for weight in weights.values()))

    @torch.inference_mode()
    def _low_rank(self, stack: Stack) -> Overlay:
        beside = side_path.low_rank(self._model, self._patches(stack.loras))
        nbytes = sum(pair.nbytes for pair in beside.values())
        self._make_room(nbytes)
        return Overlay({}, beside, self._matches(stack), nbytes)

    def _patches(self, uses: Sequence[Use]) -> dict[str, list[Scaled]]:
        """{parameter: its patches in order}, those left out that change nothing."""
        patches: dict[str, list[Scaled]] = {}
        for use in uses:
            for name, patch in self._lora(use.source).patches.items():
                scaled = Scaled(patch, use.strength, use.strength_model)
                if not scaled.changes_nothing:
                    patches.setdefault(name, []).append(scaled)
        return patches

    def _use(self, use: LoraUse) -> Use:
        source = Source(use.content) if use.name is None else self._files.source(use.name)
        return Use(source, use.strength_patch, use.strength_model)

    def _lora(self, source: Source) -> Lora:
        lora = self._files.get(source)
        if lora is None:
            raise Unavailable(f"the tensors of {source.label} are no longer held", "send the request again", 1)
        return lora

    def _matches(self, stack: Stack) -> tuple[Match, ...]:
        loras = [self._lora(use.source) for use in stack.uses]
        return tuple(Match(len(lora.patches), lora.skipped, lora.unmatched) for lora in loras)

    def _nbytes(self, stack: Stack) -> int:
        """What the overlay of `stack` takes, made or not."""
        if (made := self._overlays.get((stack, True))) is not None:
            return made.nbytes
        touched = self._patches(stack.loras).keys() | self._patches(stack.hooks).keys()
        return sum(self._base[name].nbytes for name in touched)

    def _budget(self) -> int:
        if self._fixed_budget is not None:
            return self._fixed_budget
        free = _free_bytes(next(iter(self._base.values())).device) + self.counters.nbytes
        return min(int(FREE_SHARE * free), STACKS * self._weights_bytes)

    def _make_room(self, nbytes: int) -> None:
        """Drops the least recently used until `nbytes` more fit the budget."""
        budget = self._budget()
        while self._overlays and self.counters.nbytes + nbytes > budget:
            _, dropped = self._overlays.popitem(last=False)
            self.counters.nbytes -= dropped.nbytes
            self.counters.evictions += 1


def _place(model: nn.Module, name: str) -> tuple[dict[str, nn.Parameter | None], str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module)._parameters, leaf


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
