"""Step caching: rows of a sampling run reuse what the run's earlier evaluations computed.

One state per (session, cond, latent), used only by the evaluation that directly follows the one it was made by, and
bounded by bytes and age. When anything does not fit, the row is computed in full: a lost, stale or evicted state costs
time, never the picture. Without a cache, and where no row hits, the UNet runs exactly as it does alone.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.step_policies import Candidate, Computed, Policy
from engine.unet import Control, Flow, UNet, select_control
from luna_protocol.errors import Impossible
from luna_protocol.messages import FreeU


class Latent(NamedTuple):
    """The `number`-th latent of a sampling run; its rows hit or miss together."""

    session: str
    number: int


@dataclass(frozen=True)
class Row:
    """What a batch row says about itself.

    cond: the conditioning it belongs to; step: the run's evaluations so far; start_timestep, end_timestep: the window
    in which it may hit, both included; variant: whatever else its result depends on (the LoRA stack): a state serves
    only rows of the same variant.
    """

    latent: Latent
    cond: str
    step: int
    policy: Policy
    start_timestep: float = float("inf")
    end_timestep: float = float("-inf")
    variant: Hashable = None

    @property
    def key(self) -> Hashable:
        return self.latent, self.cond


class Outcome(NamedTuple):
    """Whether a row was a hit, and the seconds that saved against its last full evaluation."""

    hit: bool
    seconds_saved: float


def rows_of(
    session: str, step: int, conds: Sequence[str], policy: Policy, window: tuple[float, float], variant: Hashable = None
) -> list[Row]:
    """The rows of one evaluation; the n-th row of each cond belongs to the session's n-th latent."""
    seen: dict[str, int] = {}
    rows = []
    for cond in conds:
        number = seen[cond] = seen.get(cond, -1) + 1
        rows.append(Row(Latent(session, number), cond, step, policy, *window, variant))
    return rows


@dataclass(frozen=True)
class _State:
    """A row after its evaluation `step`."""

    step: int
    timestep: float
    fits: Hashable
    x: Tensor
    out: Tensor
    outcome: Outcome
    hits: int
    history: tuple[Computed, ...]
    full_seconds: float

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.out.nbytes + sum(computed.nbytes for computed in self.history)


@dataclass
class _Traveller:
    """A row during one evaluation; `before` is its state, if this evaluation directly follows it."""

    row: Row | None
    timestep: float
    before: _State | None
    hit: bool = False
    probe: Tensor | None = None
    entered: Tensor | None = None
    history: tuple[Computed, ...] = ()

    def may_hit(self) -> bool:
        return self.before is not None and self.row.end_timestep <= self.timestep <= self.row.start_timestep

    def candidate(self) -> Candidate:
        return Candidate(self.timestep, self.before.history, self.before.hits, self.probe)


class StepCache:
    """The states of one UNet's sampling runs. Not thread-safe, as the compute thread alone calls it.

    Args:
        unet: what it runs.
        capacity: bytes that all states together may hold; least recently used ones go first.
        ttl: seconds after which an unused state is dropped, however much room there is.
        clock: seconds, ever rising.
    """

    def __init__(self, unet: UNet, capacity: int, ttl: float, clock: Callable[[], float] = time.monotonic):
        self.unet = unet
        self.capacity = capacity
        self.ttl = ttl
        self.clock = clock
        self.bytes = 0
        self._states: OrderedDict[Hashable, tuple[float, _State]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def check(self, policy: Policy) -> None:
        """Raises Impossible when this UNet is too shallow for the policy."""
        most = len(self.unet.input_blocks) - 1
        if policy.depth > most:
            raise Impossible(f"{policy.name} would run {policy.depth} input blocks", f"at most {most} of this UNet")

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        control: Control | None = None,
        rows: Sequence[Row | None] = (),
        free_u: Sequence[FreeU] = (),
    ) -> tuple[Tensor, list[Outcome]]:
        """`UNet.forward` of the same tensors, and what became of each row.

        Args:
            rows: what each row says about itself; None for one that reuses nothing and leaves nothing.
        """
        self._drop_stale()
        rows = list(rows) or [None] * len(x)
        times = timesteps.tolist()
        fits = (x.shape[1:], x.dtype, context.shape[1:], _names(control), tuple(free_u))
        travellers, repeats, later, keys = [], {}, [], set()
        for i, row in enumerate(rows):
            state = self._get(row, fits)
            if row and row.key in keys:
                later.append(i)
            elif state and state.step == row.step and state.timestep == times[i] and torch.equal(state.x, x[i]):
                repeats[i] = state
            else:
                follows = state and state.step + 1 == row.step and times[i] < state.timestep
                travellers.append(_Traveller(row, times[i], state if follows else None))
            keys.add(row and row.key)
        if not repeats and not later:
            return self._compute(x, timesteps, context, y, control, travellers, fits, free_u)

        def part(indices: list[int]) -> tuple:
            chosen = select_control(control or {}, indices)
            return x[indices], timesteps[indices], context[indices], None if y is None else y[indices], chosen

        results = {i: (state.out, state.outcome) for i, state in repeats.items()}
        fresh = [i for i in range(len(x)) if i not in repeats and i not in later]
        if fresh:
            results |= dict(
                zip(fresh, zip(*self._compute(*part(fresh), travellers, fits, free_u), strict=True), strict=True)
            )
        if later:
            # The same row twice in one batch is a retry that caught up with its first try.
            again = self.forward(*part(later), [rows[i] for i in later], free_u)
            results |= dict(zip(later, zip(*again, strict=True), strict=True))
        return torch.stack([results[i][0] for i in range(len(x))]), [results[i][1] for i in range(len(x))]

    def _compute(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None,
        control: Control | None,
        travellers: list[_Traveller],
        fits: Hashable,
        free_u: Sequence[FreeU],
    ) -> tuple[Tensor, list[Outcome]]:
        start = time.perf_counter()
        detours = _Detours(travellers, len(self.unet.output_blocks))
        out = self.unet.forward(x, timesteps, context, y, control, detours, free_u)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        elapsed = time.perf_counter() - start
        full, outcomes = _account(travellers, elapsed)
        for i, traveller in enumerate(travellers):
            if traveller.row:
                self._put(traveller, fits, x[i], out[i], outcomes[i], full[i])
        return out, outcomes

    def _get(self, row: Row | None, fits: Hashable) -> _State | None:
        if row is None or row.key not in self._states:
            return None
        state = self._states[row.key][1]
        return state if state.fits == (row.policy, row.variant, fits) else None

    def _put(
        self, traveller: _Traveller, fits: Hashable, x: Tensor, out: Tensor, outcome: Outcome, full_seconds: float
    ) -> None:
        row, before = traveller.row, traveller.before
        state = _State(
            step=row.step,
            timestep=traveller.timestep,
            fits=(row.policy, row.variant, fits),
            # Copies, because a view would keep its whole batch in memory.
            x=x.clone(),
            out=out.clone(),
            outcome=outcome,
            hits=before.hits + 1 if outcome.hit else 0,
            history=before.history if outcome.hit else traveller.history,
            full_seconds=full_seconds,
        )
        self._drop(row.key)
        self._states[row.key] = (self.clock(), state)
        self.bytes += state.nbytes
        while self.bytes > self.capacity:
            self._drop(next(iter(self._states)))

    def clear(self) -> None:
        """Drops every state: the next evaluations are computed in full."""
        self._states.clear()
        self.bytes = 0

    def _drop(self, key: Hashable) -> None:
        if key in self._states:
            self.bytes -= self._states.pop(key)[1].nbytes

    def _drop_stale(self) -> None:
        oldest = self.clock() - self.ttl
        while self._states and next(iter(self._states.values()))[0] < oldest:
            self._drop(next(iter(self._states)))


class _Detours:
    """Takes hits out behind their policy's input blocks, and brings them back before its output blocks."""

    def __init__(self, travellers: list[_Traveller], output_blocks: int):
        self.travellers = travellers
        self.output_blocks = output_blocks
        self.away: dict[int, Flow] = {}

    def after_input(self, index: int, flow: Flow) -> Flow:
        latents: dict[Hashable, list[int]] = {}
        for i, place in enumerate(flow.rows):
            traveller = self.travellers[place]
            if traveller.row and traveller.row.policy.depth == index + 1:
                traveller.entered = flow.h[i]
                traveller.probe = traveller.row.policy.probe([skip[i] for skip in flow.skips])
                latents.setdefault((traveller.row.latent, traveller.row.policy), []).append(i)
        leaving: dict[int, list[int]] = {}
        for (_, policy), indices in latents.items():
            pair = [self.travellers[flow.rows[i]] for i in indices]
            if all(one.may_hit() for one in pair) and policy.hit([one.candidate() for one in pair]):
                leaving.setdefault(self.output_blocks - policy.tail, []).extend(indices)
        if not leaving:
            return flow
        for back, indices in leaving.items():
            hits = self._shortened(flow.select(indices), self.output_blocks - back)
            self.away[back] = self.away[back].join(hits) if back in self.away else hits
        gone = {i for indices in leaving.values() for i in indices}
        return flow.select([i for i in range(len(flow.rows)) if i not in gone])

    def before_output(self, index: int, flow: Flow) -> Flow:
        for i, place in enumerate(flow.rows):
            traveller = self.travellers[place]
            if traveller.row and not traveller.hit and self.output_blocks - traveller.row.policy.tail == index:
                policy = traveller.row.policy
                feature = policy.feature(traveller.entered, flow.h[i])
                earlier = traveller.before.history if traveller.before else ()
                traveller.history = (*earlier, Computed(traveller.timestep, traveller.probe, feature))[-policy.keeps :]
        return flow.join(self.away.pop(index)) if index in self.away else flow

    def _shortened(self, hits: Flow, tail: int) -> Flow:
        reused = []
        for place in hits.rows:
            traveller = self.travellers[place]
            traveller.hit = True
            reused.append(traveller.row.policy.reuse(traveller.before.history, traveller.timestep, traveller.entered))
        hits.h = torch.stack(reused)
        hits.skips = hits.skips[:tail]
        return hits


def _account(travellers: list[_Traveller], elapsed: float) -> tuple[list[float], list[Outcome]]:
    """Per row, the seconds of its last full evaluation, and whether it was a hit and what that saved.

    Where hits and misses ran together, what the misses are known to cost is taken off before the rest is the hits'.
    """
    share = elapsed / len(travellers)
    if not any(one.hit for one in travellers):
        return [share] * len(travellers), [Outcome(False, 0.0)] * len(travellers)
    full = [one.before.full_seconds if one.before else share for one in travellers]
    hits = [seconds for one, seconds in zip(travellers, full, strict=True) if one.hit]
    missed = (len(travellers) - len(hits)) * sum(hits) / len(hits)
    spent = max(0.0, elapsed - missed) / len(hits)
    return full, [
        Outcome(one.hit, max(0.0, seconds - spent) if one.hit else 0.0)
        for one, seconds in zip(travellers, full, strict=True)
    ]


def _names(control: Control | None) -> Hashable:
    """Which residuals there are, whatever they hold."""
    return frozenset((place, i) for place, all_ in (control or {}).items() for i, r in enumerate(all_) if r is not None)
