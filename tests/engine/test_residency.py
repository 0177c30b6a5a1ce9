"""Who is on the device: within the budget, the least recently used make room, and who is in a run goes last."""

import threading

import pytest
import torch

from engine import residency as residency_module
from engine.residency import Residency
from luna_protocol.errors import NotLoaded, OutOfMemory


class Weights:
    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.resident, self.kept = nbytes, True, threading.Lock()

    def park(self) -> None:
        self.resident = False

    def unpark(self, device: torch.device) -> None:
        self.resident = True


class Role:
    file = None

    def __init__(self, name: str, nbytes: int, caches: int = 0) -> None:
        self.name, self.weights, self.caches = name, Weights(nbytes), caches

    def caches_bytes(self) -> int:
        return self.caches

    def drop_caches(self) -> None:
        self.caches = 0


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(residency_module.time, "monotonic", lambda: now[0])
    return now


def placed(clock, budget: int, *roles: Role, apart: float = 100.0) -> Residency:
    """Each used once, in this order, so many seconds apart."""
    residency = Residency(torch.device("cpu"), "cpu", None)
    for role in roles:
        residency.add(role)
        clock[0] += apart
    residency.budget = budget
    return residency


def resident(*roles: Role) -> list[bool]:
    return [role.weights.resident for role in roles]


def test_the_least_recently_used_parks_and_no_more_than_needed(clock):
    a, b, c = Role("a", 40), Role("b", 40), Role("c", 20)
    residency = placed(clock, 100, a, b, c)
    residency.reserve("new", 30)
    assert resident(a, b, c) == [False, True, True]


def test_what_was_used_in_the_last_seconds_goes_only_if_nothing_else_makes_room(clock):
    old, running, also_running = Role("old", 30), Role("running", 50), Role("also", 20)
    residency = placed(clock, 100, old, running, also_running, apart=5.0)
    clock[0] += 18.0  # of these, `old` alone is out of its run
    residency.reserve("new", 30)
    assert resident(old, running, also_running) == [False, True, True]
    residency.reserve("new", 60)
    assert resident(old, running, also_running) == [False, False, True]


def test_who_computes_beside_the_compute_thread_stays(clock):
    vae, unet = Role("vae", 50), Role("unet", 50)
    residency = placed(clock, 100, vae, unet)
    with vae.weights.kept:
        residency.reserve("new", 40)
    assert resident(vae, unet) == [True, False]


def test_one_that_comes_back_spares_itself_and_counts_caches(clock):
    a, b = Role("a", 50, caches=30), Role("b", 50)
    residency = placed(clock, 100, a, b)
    b.weights.park()
    residency.bring(b)
    assert resident(a, b) == [False, True] and a.caches == 0
    residency.bring(b)  # there, and everything fits
    assert resident(a, b) == [False, True] and residency.held() == 50


def test_caches_that_grew_beside_weights_make_others_go(clock):
    a, b = Role("a", 40), Role("b", 40)
    residency = placed(clock, 100, a, b)
    b.caches = 50
    residency.bring(b)
    assert resident(a, b) == [False, True] and b.caches == 50


def test_nothing_parks_for_what_can_never_fit(clock):
    a = Role("a", 50)
    residency = placed(clock, 100, a)
    with pytest.raises(OutOfMemory, match=r"big needs .* on cpu, whose budget is"):
        residency.reserve("big", 101)
    assert resident(a) == [True]


def test_without_a_budget_all_stay(clock):
    a, b = Role("a", 1 << 40), Role("b", 1 << 40)
    placed(clock, None, a, b).reserve("new", 1 << 40)
    assert resident(a, b) == [True, True]


def test_a_model_that_went_is_not_kept(clock):
    a = Role("a", 50)
    residency = placed(clock, 100, a)
    residency.remove(a)
    with pytest.raises(NotLoaded, match="a was unloaded"):
        residency.bring(a)
    assert residency.held() == 0
