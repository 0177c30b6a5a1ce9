"""Step cache settings tuned for one checkpoint: a JSON file beside it, written by scripts/tune_step_cache.py."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.step_policies import Policy, policy
from luna_protocol.errors import Impossible, Malformed
from luna_protocol.messages import Preset, StepCache

ANY = "any"


class Setting(BaseModel):
    """A policy and its window, and what was measured of it: figures by name, for people."""

    model_config = ConfigDict(extra="forbid")

    policy: str
    parameters: dict[str, float] = {}
    start_timestep: float | None = None
    end_timestep: float | None = None
    measured: dict[str, float] = {}

    def resolved(self) -> tuple[Policy, tuple[float, float]]:
        """The policy, and the window's first and last timestep.

        Raises:
            Malformed, Impossible: as `step_policies.policy`.
        """
        start = float("inf") if self.start_timestep is None else self.start_timestep
        end = float("-inf") if self.end_timestep is None else self.end_timestep
        return policy(self.policy, self.parameters), (start, end)


class Presets(BaseModel):
    """samplers: {ComfyUI's name of a sampler, or "any": {preset: setting}}. A preset that no setting earned is absent;
    floors says what each had to reach, for people."""

    model_config = ConfigDict(extra="forbid")

    floors: dict[Preset, dict[str, float]] = {}
    samplers: dict[str, dict[Preset, Setting]] = {}

    @staticmethod
    def path(checkpoint: Path) -> Path:
        """Where the presets of `checkpoint` lie."""
        return checkpoint.with_suffix(".step_cache.json")

    @classmethod
    def load(cls, checkpoint: Path) -> "Presets":
        """The presets beside `checkpoint`, none where there is no such file.

        Raises:
            Malformed, Impossible: the file is there and makes no sense.
        """
        path = cls.path(checkpoint)
        if not path.is_file():
            return cls()
        try:
            presets = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise Malformed(f"{path} holds no presets: {error}", "write it with scripts/tune_step_cache.py") from error
        for settings in presets.samplers.values():
            for setting in settings.values():
                setting.resolved()
        return presets

    def resolve(self, request: StepCache) -> tuple[Policy, tuple[float, float]]:
        """The policy and window that a request asks for.

        Raises:
            Malformed, Impossible: as `step_policies.policy`; Impossible when this model has no such preset.
        """
        if request.preset is None:
            return Setting(
                policy=request.policy,
                parameters=request.parameters,
                start_timestep=request.start_timestep,
                end_timestep=request.end_timestep,
            ).resolved()
        if not self.samplers:
            raise Impossible(
                f"this model has no preset {request.preset!r}",
                "run scripts/tune_step_cache.py for it, or give a policy and its parameters",
            )
        settings = self.samplers.get(request.sampler or ANY, self.samplers.get(ANY, {}))
        if request.preset not in settings:
            raise Impossible(
                f"no setting earned the preset {request.preset!r} with sampler {request.sampler or ANY!r}",
                f"it has {', '.join(settings) or 'none'}; fewer steps are the better way to save time there",
            )
        return settings[request.preset].resolved()
