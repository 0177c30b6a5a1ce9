"""Who computes when: joins without waiting, turns by cost, late jobs, and clients that have left."""

import threading
import time
from types import SimpleNamespace

import pytest

from engine.role import Item, Reply
from engine.scheduler import WAITING, Call, Scheduler
from luna_protocol.errors import Full, Impossible, Internal
from luna_protocol.messages import Ready, UNetForward

GUARD = SimpleNamespace(ready=lambda role: None, run=lambda role, function: function())


class Recorder:
    """A role that notes what ran together, and takes as long as it is told to; `gate` holds its first forward up."""

    def __init__(self, positions=100):
        self.name = "m"
        self.settings = SimpleNamespace(batch_positions=positions)
        self.ran = []
        self.seconds = 0.0
        self.gate = threading.Event()

    def admit(self, item):
        if item.tensors.get("bad") == "at once":
            raise Impossible("bad")
        return None

    def group_key(self, item):
        return item.tensors.get("key", 0)

    def batch_size(self, item):
        return item.tensors.get("size", 1)

    def run(self, items):
        self.gate.wait(10)
        self.ran.append([item.tensors["name"] for item in items])
        if any(item.tensors.get("bad") == "in a group" for item in items):
            raise Impossible("bad")
        time.sleep(self.seconds * sum(map(self.batch_size, items)))
        return [Reply(Ready(), {"name": item.tensors["name"]}) for item in items]


def call(role, name, client=None, is_gone=lambda: False, **fields):
    return Call(role, Item(UNetForward(), {"name": name, **fields}), client or name, is_gone)


@pytest.fixture
def scheduler():
    return Scheduler(GUARD)


def held_up(scheduler, role):
    """A forward that runs until the gate opens, so that others have to wait."""
    first = call(role, "first", key="first")
    scheduler.submit(first)
    while not scheduler.is_busy(role) or scheduler.since is None:
        time.sleep(0.001)
    return first


def test_a_lone_request_runs_at_once(scheduler):
    role = Recorder()
    role.gate.set()
    alone = call(role, "a")
    scheduler.submit(alone)
    assert alone.outcome.result(5).tensors == {"name": "a"}


def test_what_waits_and_fits_joins_the_next_forward(scheduler):
    role = Recorder(positions=4)
    held_up(scheduler, role)
    calls = [
        call(role, "a"),
        call(role, "other", key=1),
        call(role, "b", size=2),
        call(role, "c", size=2),
        call(role, "d"),
    ]
    for each in calls:
        scheduler.submit(each)
    role.gate.set()
    for each in calls:
        assert each.outcome.result(5).tensors["name"] == each.item.tensors["name"]
    assert role.ran == [["first"], ["a", "b", "d"], ["other"], ["c"]]


def test_one_that_fails_in_a_group_costs_the_others_nothing(scheduler):
    role = Recorder()
    held_up(scheduler, role)
    good, bad, worse = call(role, "good"), call(role, "bad", bad="in a group"), call(role, "worse", bad="at once")
    scheduler.submit(good, bad, worse)
    role.gate.set()
    assert good.outcome.result(5)
    for each in (bad, worse):
        with pytest.raises(Impossible):
            each.outcome.result(5)


def test_a_fault_of_our_own_code_is_told_and_the_line_goes_on(scheduler):
    role = Recorder()
    role.gate.set()
    role.group_key = lambda item: {}["no such key"]
    broken = call(role, "a")
    scheduler.submit(broken)
    with pytest.raises(Internal, match="no such key"):
        broken.outcome.result(5)
    del role.group_key
    alone = call(role, "b")
    scheduler.submit(alone)
    assert alone.outcome.result(5)


def test_clients_take_turns_by_what_they_have_cost(scheduler):
    """One client's batches of 16 and another's single pictures: a picture waits for one batch at most."""
    role = Recorder(positions=1)
    role.seconds = 0.002
    held_up(scheduler, role)
    batches = [call(role, f"batch{i}", "heavy", size=16) for i in range(4)]
    singles = [call(role, f"single{i}", "light") for i in range(4)]
    scheduler.submit(*batches, *singles)
    role.gate.set()
    for each in (*batches, *singles):
        each.outcome.result(10)
    order = [name for (name,) in role.ran[1:]]
    assert order.index("single3") < order.index("batch1")


def test_jobs_come_last_and_are_not_starved(scheduler, monkeypatch):
    monkeypatch.setattr("engine.scheduler.LATE_SECONDS", 0.2)
    role = Recorder(positions=1)
    held_up(scheduler, role)
    done = []
    job = threading.Thread(target=lambda: done.append(scheduler.compute(lambda: len(role.ran), "queue")))
    job.start()
    time.sleep(0.05)
    calls = [call(role, f"c{i}", "client") for i in range(60)]
    scheduler.submit(*calls)
    role.seconds = 0.01
    role.gate.set()
    for each in calls:
        each.outcome.result(10)
    job.join(10)
    assert 5 < done[0] < 60


def test_a_request_whose_client_has_left_does_not_run(scheduler):
    role = Recorder(positions=1)
    held_up(scheduler, role)
    gone, there = call(role, "gone", is_gone=lambda: True), call(role, "there")
    scheduler.submit(gone, there)
    role.gate.set()
    assert there.outcome.result(5)
    assert gone.outcome.cancelled() and role.ran == [["first"], ["there"]]


def test_a_forward_ends_between_blocks_once_all_its_clients_have_left(scheduler):
    role, left, blocks = Recorder(), set(), []

    def run(items):
        for block in range(200):
            scheduler.between_blocks()
            blocks.append(block)
            left.update({5: "ab", 50: "abc"}.get(block, ""))
            time.sleep(0.005)

    role.run = run
    calls = [call(role, name, is_gone=lambda name=name: name in left) for name in "abc"]
    scheduler.submit(*calls)
    deadline = time.monotonic() + 10
    while not all(each.outcome.done() for each in calls) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(each.outcome.cancelled() for each in calls)
    assert 50 <= max(blocks) < 199
    role.run = Recorder.run.__get__(role)
    role.gate.set()
    scheduler.submit(after := call(role, "after"))
    assert after.outcome.result(5)


def test_a_full_line_says_so(scheduler):
    role = Recorder()
    held_up(scheduler, role)
    calls = [call(role, str(i)) for i in range(WAITING + 1)]
    scheduler.submit(*calls)
    with pytest.raises(Full, match="requests wait for m already"):
        calls[-1].outcome.result(5)
    role.gate.set()
    assert calls[0].outcome.result(5)


def test_what_waits_for_a_model_that_goes_is_told(scheduler):
    role = Recorder()
    held_up(scheduler, role)
    waiting = call(role, "a")
    scheduler.submit(waiting)
    scheduler.drop(role, Impossible("gone"))
    with pytest.raises(Impossible, match="gone"):
        waiting.outcome.result(5)
    role.gate.set()
