import pytest

from comfy_client.proxies.step_cache import StepCacheSettings


def _timestep_at(percent: float) -> float:
    return 999 * (1 - percent)


def test_percents_become_timesteps_and_the_ends_no_bound():
    request = StepCacheSettings(start_percent=0.25, residual_threshold=0.2, max_consecutive_hits=3).request(
        "run", 4, ["cond", "uncond"], _timestep_at
    )
    assert (request.session, request.step, request.conds) == ("run", 4, ["cond", "uncond"])
    assert request.parameters == {"residual_threshold": 0.2, "max_consecutive_hits": 3}
    assert request.start_timestep == pytest.approx(749.25) and request.end_timestep is None


def test_a_preset_brings_everything_itself():
    request = StepCacheSettings(preset="balanced", sampler="euler").request("run", 0, ["cond"], _timestep_at)
    assert (request.preset, request.sampler, request.parameters) == ("balanced", "euler", {})


def test_a_window_that_ends_before_it_starts_is_told():
    with pytest.raises(ValueError, match="start_percent must be below end_percent"):
        StepCacheSettings(start_percent=0.8, end_percent=0.3)
