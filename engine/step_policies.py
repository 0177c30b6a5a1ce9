"""What a step cache reuses, and when: one small class per policy.

A hit runs `depth` input blocks, takes what the policy makes of earlier evaluations, and goes on with the last `tail`
output blocks and the head. `StepCache` keeps the histories and asks the policy; to add a policy, write its class here.
"""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from luna_protocol.errors import Impossible
from luna_protocol.messages import validate


@dataclass(frozen=True)
class Computed:
    """What a row keeps of an evaluation that was computed in full.

    probe: what the next decision is compared with, or None; feature: what a hit reuses. Both [c, h, w].
    """

    timestep: float
    probe: Tensor | None
    feature: Tensor

    @property
    def nbytes(self) -> int:
        return self.feature.nbytes + (0 if self.probe is None else self.probe.nbytes)


@dataclass(frozen=True)
class Candidate:
    """A row that may become a hit.

    timestep: the one it is to be evaluated at; history: full evaluations of the run, newest last, at least one; hits:
    how many hits in a row came after them.
    """

    timestep: float
    history: tuple[Computed, ...]
    hits: int
    probe: Tensor | None


class Policy(BaseModel):
    """One way to reuse; its fields are the parameters that a request may set.

    Attributes:
        name: what requests call it.
        depth: input blocks that a hit runs, at least 1.
        tail: output blocks that a hit runs, at most `depth`, because each takes up the skip of an input block.
        keeps: how many full evaluations a row's history holds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    depth: ClassVar[int]
    tail: ClassVar[int]
    keeps: ClassVar[int] = 1

    def probe(self, skips: list[Tensor]) -> Tensor | None:
        """What decides, from a row's `depth` skips [c, h, w]."""
        return None

    def hit(self, rows: list[Candidate]) -> bool:
        """Whether the rows of one latent (cond and uncond, say) may all be hits."""
        raise NotImplementedError

    def feature(self, entered: Tensor, reached: Tensor) -> Tensor:
        """What to keep of a row: `entered` is h behind the last of the `depth` input blocks, `reached` h before the
        `tail` output blocks."""
        raise NotImplementedError

    def reuse(self, history: tuple[Computed, ...], timestep: float, entered: Tensor) -> Tensor:
        """A hit's h before the `tail` output blocks."""
        raise NotImplementedError


class FirstBlock(Policy):
    """First-block cache: while the first block's residual hardly changes, so does what follows, it is assumed.

    residual_threshold: largest mean |change| of that residual since the last full evaluation, relative to its mean
        magnitude. 0 never hits.
    max_consecutive_hits: -1 for no bound.

    Source: ParaAttention's and WaveSpeed's First Block Cache, after TeaCache (arXiv:2411.19108); on a UNet the first
    block is input_blocks[1] and the cached residual ends before the head.
    """

    name = "first_block"
    depth = 2
    tail = 0

    residual_threshold: float = Field(default=0.1, ge=0, le=10, allow_inf_nan=False)
    max_consecutive_hits: int = Field(default=-1, ge=-1, le=1000)

    def probe(self, skips: list[Tensor]) -> Tensor:
        return skips[1] - skips[0]

    def hit(self, rows: list[Candidate]) -> bool:
        if 0 <= self.max_consecutive_hits <= max(row.hits for row in rows) or not self.residual_threshold:
            return False
        change = sum((row.history[-1].probe - row.probe).abs().float().mean() for row in rows)
        size = sum(row.history[-1].probe.abs().float().mean() for row in rows)
        return bool(change < self.residual_threshold * size)

    def feature(self, entered: Tensor, reached: Tensor) -> Tensor:
        return reached - entered

    def reuse(self, history: tuple[Computed, ...], timestep: float, entered: Tensor) -> Tensor:
        return entered + history[-1].feature


class DeepCache(Policy):
    """DeepCache: the deep features of a full evaluation serve the next ones, only the shallow blocks run.

    interval: every how many evaluations one is computed in full; 1 never hits.
    reach: how many timesteps below the last full evaluation a hit may lie. With it, a setting that is good for a run of
        30 steps is so for one of 20, whose steps are longer.
    branch: how many input and output blocks a hit still runs.

    Source: Ma, Fang, Wang, "DeepCache: Accelerating Diffusion Models for Free", arXiv:2312.00858 (uniform interval).
    """

    name = "deep_cache"

    interval: int = Field(default=2, ge=1, le=100)
    reach: float = Field(default=1000, ge=0, le=1000)
    branch: int = Field(default=1, ge=1, le=32)

    @property
    def depth(self) -> int:
        return self.branch

    @property
    def tail(self) -> int:
        return self.branch

    def hit(self, rows: list[Candidate]) -> bool:
        reached = max(row.history[-1].timestep - row.timestep for row in rows)
        return max(row.hits for row in rows) < self.interval - 1 and reached <= self.reach

    def feature(self, entered: Tensor, reached: Tensor) -> Tensor:
        return reached.clone()

    def reuse(self, history: tuple[Computed, ...], timestep: float, entered: Tensor) -> Tensor:
        return history[-1].feature


class Forecast(DeepCache):
    """DeepCache whose features are not held but extrapolated to the present timestep.

    interval, reach: as there.
    branch: how many input and output blocks a hit still runs; with 0 only the head, on features foreseen.
    order: degree of the polynomial through the last order + 1 full evaluations; hits wait until there are so many.

    Source: Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", arXiv:2503.06923,
    here as Lagrange's polynomial in the timestep, because full evaluations need not be evenly spaced.
    """

    name = "forecast"

    branch: int = Field(default=0, ge=0, le=32)
    order: int = Field(default=1, ge=1, le=3)

    @property
    def depth(self) -> int:
        return max(self.branch, 1)

    @property
    def keeps(self) -> int:
        return self.order + 1

    def hit(self, rows: list[Candidate]) -> bool:
        return min(len(row.history) for row in rows) > self.order and super().hit(rows)

    def reuse(self, history: tuple[Computed, ...], timestep: float, entered: Tensor) -> Tensor:
        total = 0
        for one in history:
            weight = 1.0
            for other in history:
                if other is not one:
                    weight *= (timestep - other.timestep) / (one.timestep - other.timestep)
            total = total + weight * one.feature
        return total


_POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (FirstBlock, DeepCache, Forecast)}


def policy(name: str, parameters: dict[str, float]) -> Policy:
    """The policy `name` with these parameters.

    Raises:
        Malformed: it has no such parameter, or the value is of another type.
        Impossible: there is no such policy, or a value is out of its range.
    """
    if name not in _POLICIES:
        raise Impossible(f"there is no step cache policy {name!r}", f"there are {', '.join(_POLICIES)}")
    return validate(_POLICIES[name], parameters)
