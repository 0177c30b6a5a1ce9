import psutil
import pytest
import torch

from engine.step_cache import StepCache, rows_of
from engine.step_policies import Computed, policy
from engine.unet import UNet
from luna_protocol.errors import Impossible, Malformed
from tests.engine.conftest import CPU

ALWAYS = (float("inf"), float("-inf"))
EAGER = policy("first_block", {"residual_threshold": 10})  # hits whenever it may
POLICIES = [
    ("first_block", {"residual_threshold": 0.2}),
    ("deep_cache", {"interval": 3, "branch": 2}),
    ("forecast", {"interval": 2, "branch": 1, "order": 1}),
]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def unet(tiny):
    path, parts = tiny("tiny_sd15")
    return UNet.load(path, parts["unet"], torch.float32, CPU)


@pytest.fixture
def cache(unet):
    return StepCache(unet, 1 << 30, 60)


class Run:
    """A sampling run of cond and uncond whose latent moves a little every step."""

    def __init__(self, cache, session="run", seed=0, chosen=EAGER, latents=1, side=8, variant=None, window=ALWAYS):
        generator = torch.Generator().manual_seed(seed)
        self.cache, self.session, self.policy, self.variant, self.window = cache, session, chosen, variant, window
        self.latents = latents
        self.x = torch.randn(latents, 4, side, side, generator=generator)
        contexts = torch.randn(2, 77, cache.unet.layout.context_dim, generator=generator)
        self.context = contexts.repeat_interleave(latents, 0)
        self.count = 0

    def arguments(self, step=None, timestep=None):
        step = self.count if step is None else step
        timestep = 999.0 - 40 * step if timestep is None else timestep
        return torch.cat([self.x, self.x]), torch.full((2 * self.latents,), timestep), self.context

    def rows(self, step=None):
        conds = ["uncond"] * self.latents + ["cond"] * self.latents
        step = self.count if step is None else step
        return rows_of(self.session, step, conds, self.policy, self.window, self.variant)

    def evaluate(self, step=None, timestep=None):
        out, outcomes = self.cache.forward(*self.arguments(step, timestep), rows=self.rows(step))
        return out, [outcome.hit for outcome in outcomes]

    def step(self):
        """One step of an Euler-like sampler; returns the hits."""
        out, hits = self.evaluate()
        uncond, cond = out.chunk(2)
        self.x = self.x - 0.05 * (uncond + 4 * (cond - uncond))
        self.count += 1
        return hits

    def plain(self, step=None, timestep=None):
        return self.cache.unet.forward(*self.arguments(step, timestep))


def test_threshold_zero_is_the_uncached_run_bit_for_bit(cache):
    cached = Run(cache, chosen=policy("first_block", {"residual_threshold": 0}), latents=2)
    for _ in range(5):
        expected = cached.plain()
        out, hits = cached.evaluate()
        assert torch.equal(out, expected) and not any(hits)
        cached.step()


def test_without_rows_nothing_is_reused_and_nothing_kept(cache):
    run = Run(cache)
    for step in range(3):
        out, outcomes = cache.forward(*run.arguments(step))
        assert torch.equal(out, run.plain(step)) and not any(outcome.hit for outcome in outcomes)
    assert len(cache) == 0 and cache.bytes == 0


def parts(unet, run, step):
    """h behind the first two input blocks and before the head, block by block."""
    x, timesteps, context = run.arguments(step)
    emb, h, skips = unet.embed(timesteps, None), x, []
    for block in unet.input_blocks:
        h = unet.run(block, h, emb, context)
        skips.append(h)
    before, after, tails = skips[0], skips[1], []
    h = unet.run(unet.middle_block, h, emb, context)
    for block in unet.output_blocks:
        tails.append(h)
        skip = skips.pop()
        size = skips[-1].shape[2:] if skips else None
        h = unet.run(block, torch.cat((h, skip), 1), emb, context, size)
    return before, after, h, tails


@pytest.mark.parametrize("side", [0.999, 1.001])
def test_first_block_decides_and_reuses_as_described(cache, unet, side):
    run = Run(cache)
    before, after, last, _ = parts(unet, run, 0)
    run_at_1 = Run(cache)
    run_at_1.x = run.x + 0.1
    before_1, after_1, _, _ = parts(unet, run_at_1, 1)
    old, new = after - before, after_1 - before_1
    change = ((old - new).abs().mean() / old.abs().mean()).item()
    chosen = policy("first_block", {"residual_threshold": change * side})
    run.policy = run_at_1.policy = chosen
    run.evaluate(0)
    out, hits = run_at_1.evaluate(1)
    assert hits == [side > 1] * 2
    expected = unet.head(after_1 + (last - after)) if side > 1 else run_at_1.plain(1)
    assert torch.equal(out, expected)


def test_deep_cache_runs_the_shallow_blocks_on_held_features(cache, unet):
    run = Run(cache, chosen=policy("deep_cache", {"interval": 2, "branch": 2}))
    *_, tails = parts(unet, run, 0)
    run.evaluate(0)
    run.x = run.x + 0.1
    out, hits = run.evaluate(1)
    x, timesteps, context = run.arguments(1)
    emb = unet.embed(timesteps, None)
    first = unet.run(unet.input_blocks[0], x, emb, context)
    second = unet.run(unet.input_blocks[1], first, emb, context)
    h = unet.run(unet.output_blocks[-2], torch.cat((tails[-2], second), 1), emb, context, first.shape[2:])
    h = unet.run(unet.output_blocks[-1], torch.cat((h, first), 1), emb, context)
    assert hits == [True, True] and torch.equal(out, unet.head(h))


def test_interval_and_bound_on_hits_in_a_row(cache):
    deep = Run(cache, "deep", chosen=policy("deep_cache", {"interval": 3}))
    assert [deep.step()[0] for _ in range(7)] == [False, True, True, False, True, True, False]
    bounded = Run(cache, "bounded", chosen=policy("first_block", {"residual_threshold": 10, "max_consecutive_hits": 1}))
    assert [bounded.step()[0] for _ in range(5)] == [False, True, False, True, False]
    never = Run(cache, "never", chosen=policy("first_block", {"residual_threshold": 10, "max_consecutive_hits": 0}))
    assert not any(never.step()[0] for _ in range(3))
    every = Run(cache, "every", chosen=policy("deep_cache", {"interval": 1}))
    assert not any(every.step()[0] for _ in range(3))
    waiting = Run(cache, "waiting", chosen=policy("forecast", {"interval": 2, "order": 2}))
    assert [waiting.step()[0] for _ in range(6)] == [False, False, False, True, False, True]


@pytest.mark.parametrize(
    ("reach", "hits"), [(39, "......"), (40, ".x.x.x"), (79, ".x.x.x"), (80, ".xx.xx"), (1000, ".xxx.x")]
)
def test_a_hit_lies_within_reach_of_the_last_full_step(cache, reach, hits):
    run = Run(cache, chosen=policy("deep_cache", {"interval": 4, "reach": reach}))
    assert "".join("x" if run.step()[0] else "." for _ in range(6)) == hits


def test_the_window_is_inclusive(cache):
    run = Run(cache, window=(959.0, 879.0))
    assert [run.step()[0] for _ in range(6)] == [False, True, True, True, False, False]


@pytest.mark.parametrize("chosen", POLICIES)
def test_a_retry_of_the_same_step_answers_the_same(cache, chosen):
    run = Run(cache, chosen=policy(*chosen))
    for _ in range(6):
        out, hits = run.evaluate()
        again, hits_again = run.evaluate()
        assert torch.equal(out, again) and hits == hits_again
        run.step()


def test_a_retry_in_the_same_batch_answers_the_same(cache):
    run = Run(cache)
    run.step()
    twice = [torch.cat([tensor, tensor]) for tensor in run.arguments()]
    out, outcomes = cache.forward(*twice, rows=run.rows() * 2)
    assert torch.equal(out[:2], out[2:]) and outcomes[:2] == outcomes[2:]
    assert [outcome.hit for outcome in outcomes] == [True] * 4


def full(run, **where):
    out, hits = run.evaluate(**where)
    return not any(hits) and torch.equal(out, run.plain(**where))


def test_what_does_not_follow_is_computed_in_full(cache):
    for case in ("gap", "back", "same timestep", "higher timestep", "same step, other latent"):
        run = Run(cache, case)
        run.step(), run.step()
        if case == "gap":
            assert full(run, step=3)
        elif case == "back":
            assert full(run, step=0)
        elif case == "same timestep":  # the second evaluation of a Heun step
            assert full(run, step=2, timestep=959.0)
        elif case == "higher timestep":
            assert full(run, step=2, timestep=999.0)
        else:
            assert full(run, step=1)


def test_what_changed_is_computed_in_full(cache, noise):
    run = Run(cache)
    run.step()
    assert any(run.evaluate()[1])
    run.step()
    run.variant = "another LoRA stack"
    assert full(run)
    run.step()
    assert any(run.step())
    run.policy = policy("deep_cache", {})
    assert full(run)
    run.step()
    run.x = noise(1, 4, 8, 10)
    assert full(run)
    run.step()
    run.context = run.context[:, :40]
    assert full(run)
    run.step()
    run.session = "another"
    assert full(run)


def test_control_residuals_that_come_or_go_are_a_miss(cache, unet):
    run = Run(cache)
    run.step()
    x, timesteps, context = run.arguments()
    control = {"middle": [torch.ones(2, *unet.model.mid_block.resnets[0].conv1.weight.shape[:1], 2, 2)]}
    out, outcomes = cache.forward(x, timesteps, context, control=control, rows=run.rows())
    assert not any(outcome.hit for outcome in outcomes)
    assert torch.equal(out, unet.forward(x, timesteps, context, control=control))
    run.count += 1
    out, outcomes = cache.forward(*run.arguments(), control=control, rows=run.rows())
    assert all(outcome.hit for outcome in outcomes)


@pytest.mark.parametrize("chosen", POLICIES)
def test_sessions_interleaved_step_by_step_are_what_each_is_alone(unet, chosen):
    def runs(cache):
        return [
            Run(cache, f"session {seed}", seed, policy(*chosen), variant=("lora", seed), latents=seed)
            for seed in (1, 2)
        ]

    alone = [Run(StepCache(unet, 1 << 30, 60), "x", seed, policy(*chosen), latents=seed) for seed in (1, 2)]
    hits_alone = [[run.step() for _ in range(8)] for run in alone]
    together = runs(StepCache(unet, 1 << 30, 60))
    hits = [[], []]
    for _ in range(8):
        for run, seen in zip(together, hits, strict=True):
            seen.append(run.step())
    assert hits == hits_alone and any(any(h) for h in hits[0])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.x, other.x)


def test_a_latents_rows_hit_or_miss_together(cache):
    run = Run(cache, latents=2)
    run.step()
    cache._drop((run.rows()[0].latent, "uncond"))  # as an eviction would
    _, hits = run.evaluate()
    assert hits == [False, True, False, True]


@pytest.mark.parametrize("chosen", POLICIES)
def test_sessions_of_one_batch_decide_alone_and_misses_run_as_a_smaller_batch(cache, unet, chosen):
    old, new = Run(cache, "old", 1, policy(*chosen)), Run(cache, "new", 2, policy(*chosen))
    while not any(old.evaluate()[1]):
        old.step()
    expected, _ = old.evaluate()
    expected_old, expected_new = expected, new.plain()
    old.cache = new.cache = StepCache(unet, 1 << 30, 60)
    replay = Run(old.cache, "old", 1, policy(*chosen))
    while replay.count < old.count:
        replay.step()
    plain = (torch.randn(1, 4, 8, 8), torch.full((1,), 500.0), old.context[:1])
    joined = [torch.cat(three) for three in zip(new.arguments(), replay.arguments(), plain, strict=True)]
    seen = []
    hook = unet.middle_block[0].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    out, outcomes = old.cache.forward(*joined, rows=[*new.rows(), *replay.rows(), None])
    hook.remove()
    assert [outcome.hit for outcome in outcomes] == [False, False, True, True, False] and seen == [3]
    for part, whole in ((out[:2], expected_new), (out[2:4], expected_old), (out[4:], unet.forward(*plain))):
        assert torch.allclose(part, whole, atol=1e-5)


def test_policies_of_one_batch_keep_to_themselves(cache):
    runs = [Run(cache, name, seed, policy(name, values)) for seed, (name, values) in enumerate(POLICIES)]
    alone = [Run(StepCache(cache.unet, 1 << 30, 60), "x", i, run.policy) for i, run in enumerate(runs)]
    for _ in range(8):
        expected, hits = zip(*(one.evaluate() for one in alone), strict=True)
        joined = [torch.cat(tensors) for tensors in zip(*(run.arguments() for run in runs), strict=True)]
        out, outcomes = cache.forward(*joined, rows=[row for run in runs for row in run.rows()])
        assert [outcome.hit for outcome in outcomes] == [hit for pair in hits for hit in pair]
        assert torch.allclose(out, torch.cat(expected), atol=1e-4)
        for run, one in zip(runs, alone, strict=True):
            one.step()
            run.x, run.count = one.x, one.count


def test_a_failed_evaluation_changes_nothing(cache, unet, monkeypatch):
    run = Run(cache)
    run.step()
    monkeypatch.setattr(unet, "head", lambda h: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.evaluate()
    monkeypatch.undo()
    assert all(run.evaluate()[1])


def test_states_stay_within_their_bytes_and_the_oldest_go_first(unet):
    cache = StepCache(unet, 1 << 30, 60)
    Run(cache, "a").step()
    cache.capacity = 2 * cache.bytes
    b, c = Run(cache, "b"), Run(cache, "c")
    b.step(), c.step()
    assert cache.bytes == cache.capacity and len(cache) == 4
    assert all(b.evaluate()[1]) and all(c.evaluate()[1])
    assert full(Run(cache, "a"), step=1)
    tiny = StepCache(unet, 1000, 60)
    run = Run(tiny)
    assert full(run) and (len(tiny), tiny.bytes) == (0, 0)


def test_a_thousand_abandoned_sessions_leave_memory_where_it_was(unet):
    clock = Clock()
    cache = StepCache(unet, 1 << 20, 60, clock)
    process = psutil.Process()
    for batch in range(40):
        runs = [Run(cache, f"abandoned {batch} {i}", i, side=4) for i in range(25)]
        joined = [torch.cat(tensors) for tensors in zip(*(run.arguments() for run in runs), strict=True)]
        cache.forward(*joined, rows=[row for run in runs for row in run.rows()])
        if batch == 9:
            held, resident = (len(cache), cache.bytes), process.memory_info().rss
    assert (len(cache), cache.bytes) == held and cache.bytes <= 1 << 20
    assert process.memory_info().rss - resident < 8 << 20
    clock.now = 61
    cache.forward(*Run(cache).arguments())
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_state_lives_as_long_as_it_is_used(unet):
    clock = Clock()
    cache = StepCache(unet, 1 << 30, 60, clock)
    used, idle = Run(cache, "used"), Run(cache, "idle")
    used.step(), idle.step()
    for clock.now in (50, 100):
        assert any(used.step())
    assert full(idle)


def test_seconds_saved_are_those_of_hits(cache):
    run = Run(cache, side=32)
    _, missed = cache.forward(*run.arguments(), rows=run.rows())
    run.count = 1
    _, hit = cache.forward(*run.arguments(), rows=run.rows())
    assert all(outcome.seconds_saved == 0 for outcome in missed)
    assert all(outcome.hit and outcome.seconds_saved > 0 for outcome in hit)


def test_forecast_continues_a_straight_line():
    line = [Computed(t, None, torch.tensor([2 * t, -t])) for t in (900.0, 700.0)]
    assert policy("forecast", {"order": 1}).reuse(tuple(line), 650.0, None).tolist() == [1300.0, -650.0]
    curve = [Computed(t, None, torch.tensor([t * t], dtype=torch.float64)) for t in (900.0, 700.0, 600.0)]
    value = policy("forecast", {"order": 2}).reuse(tuple(curve), 500.0, None)
    assert value.item() == pytest.approx(250_000)


@pytest.mark.parametrize(
    ("name", "parameters", "error"),
    [
        ("second_block", {}, Impossible),
        ("first_block", {"interval": 2}, Malformed),
        ("first_block", {"residual_threshold": -0.1}, Impossible),
        ("first_block", {"residual_threshold": float("nan")}, Impossible),
        ("first_block", {"max_consecutive_hits": -2}, Impossible),
        ("first_block", {"max_consecutive_hits": 0.5}, Impossible),
        ("deep_cache", {"interval": 0}, Impossible),
        ("forecast", {"reach": -1}, Impossible),
        ("forecast", {"order": 9}, Impossible),
    ],
)
def test_bad_policies_are_refused(name, parameters, error):
    with pytest.raises(error):
        policy(name, parameters)


def test_a_policy_deeper_than_the_unet_is_refused(cache):
    cache.check(policy("deep_cache", {"branch": 5}))
    with pytest.raises(Impossible, match="at most 5"):
        cache.check(policy("deep_cache", {"branch": 6}))
