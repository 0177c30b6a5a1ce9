"""A node's step-cache switches, carried in a MODEL's transformer options to each of its forwards."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from luna_protocol.messages import Preset, StepCache

STEP_CACHE_KEY = "luna_step_cache"
PRESETS = ("none", *get_args(Preset))


@dataclass(frozen=True)
class StepCacheSettings:
    """As the nodes offer them.

    start_percent, end_percent: the part of the run in which steps may be reused, 0 its start and 1 its end.
    residual_threshold: relative change of the first block's residual below which a step is reused.
    max_consecutive_hits: -1 for no bound.
    preset: a tuned policy instead of all of these, or "none".
    sampler: ComfyUI's name of the sampler a preset should suit; None where it is not known yet.

    Raises:
        ValueError: start_percent is not below end_percent.
    """

    start_percent: float = 0.0
    end_percent: float = 1.0
    residual_threshold: float = 0.1
    max_consecutive_hits: int = -1
    preset: str = "none"
    sampler: str | None = None

    def __post_init__(self) -> None:
        if self.start_percent >= self.end_percent:
            raise ValueError(
                f"the step cache starts at {self.start_percent} and ends at {self.end_percent}: "
                "start_percent must be below end_percent"
            )

    def request(self, session: str, step: int, conds: list[str], timestep_at: Callable[[float], float]) -> StepCache:
        """What a forward sends; `timestep_at` maps a percent of the run to the model's timestep."""
        if self.preset != "none":
            return StepCache(session=session, step=step, conds=conds, preset=self.preset, sampler=self.sampler)
        return StepCache(
            session=session,
            step=step,
            conds=conds,
            parameters={
                "residual_threshold": self.residual_threshold,
                "max_consecutive_hits": self.max_consecutive_hits,
            },
            start_timestep=None if self.start_percent <= 0 else timestep_at(self.start_percent),
            end_timestep=None if self.end_percent >= 1 else timestep_at(self.end_percent),
        )
