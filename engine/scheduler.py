"""One thread computes. Whatever waits meanwhile and fits together runs as the next forward, so that joining costs a
lone client no wait; and clients take turns by what they have cost.

Start-time fair queueing (Goyal, Vin, Cheng 1996) with seconds of the device for bytes: each client has a virtual time
that its forwards move on, the lowest goes first, and whoever comes back from a pause begins where the clock stands.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from engine.role import Item, Reply, Role
from luna_protocol.errors import Full, Internal, LunaError

log = logging.getLogger(__name__)

WAITING = 100  # requests for one model; TorchServe's own bound is the same
LATE_SECONDS = 5.0  # how long what comes last lets others pass
_ASK_EVERY = 0.02  # seconds between looks whether a running forward's clients are still there


class Abandoned(Exception):
    """Nobody waits for the forward that runs."""


class Guard(Protocol):
    """What stands around each forward."""

    def ready(self, role: Role) -> None:
        """Has the role's weights on its device."""

    def run(self, role: Role, function: Callable[[], Any]) -> Any:
        """What `function` returns; raises LunaErrors only, or Abandoned."""


@dataclass(eq=False)
class Call:
    """One request that waits for the device, or has it.

    client: who pays for it. is_gone: whether its client has left. outcome: a Reply; raises LunaError.
    """

    role: Role
    item: Item
    client: str
    is_gone: Callable[[], bool] = lambda: False
    outcome: "Future[Reply]" = field(default_factory=Future)
    arrived: float = 0.0
    admitted: bool = False


@dataclass(eq=False)
class Job:
    """A function that needs the device, when nobody else does."""

    function: Callable[[], Any]
    client: str
    outcome: Future = field(default_factory=Future)
    arrived: float = 0.0


class Scheduler:
    """Calls and jobs in line, and the thread that does them.

    Args:
        guard: see `Guard`.
        ran: is told of each forward: its role, how many requests it answered, and its seconds.
    """

    def __init__(self, guard: Guard, ran: Callable[[Role, int, float], None] = lambda *_: None):
        self._guard = guard
        self._ran = ran
        self._line: list[Call | Job] = []
        self._changed = threading.Condition()
        self._spent: dict[str, float] = {}
        self._clock = 0.0
        self._group: list[Call] = []
        self._asked = 0.0
        self.since: tuple[Role | None, float] | None = None
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(self, *calls: Call) -> None:
        """Puts requests in line together; each gets its `outcome`, `Full` where too many wait already."""
        with self._changed:
            for call in calls:
                if sum(isinstance(each, Call) and each.role is call.role for each in self._line) >= WAITING:
                    full = Full(f"{WAITING} requests wait for {call.role.name} already", "try again", retry_after=0.5)
                    call.outcome.set_exception(full)
                else:
                    self._enter(call)
            self._changed.notify()

    def compute(self, function: Callable[[], Any], client: str) -> Any:
        """What `function` returns on the compute thread, once nobody's request waits or it has waited for long."""
        if threading.current_thread() is self._thread:
            return function()
        job = Job(function, client)
        with self._changed:
            self._enter(job)
            self._changed.notify()
        return job.outcome.result()

    def drop(self, role: Role, error: LunaError) -> None:
        """Answers what waits for a role that is about to go."""
        with self._changed:
            dropped = [each for each in self._line if isinstance(each, Call) and each.role is role]
            self._line = [each for each in self._line if each not in dropped]
        for call in dropped:
            call.outcome.set_exception(error)

    def is_busy(self, role: Role) -> bool:
        """Whether a request for it runs or waits."""
        with self._changed:
            return any(call.role is role for call in [*self._group, *self._line] if isinstance(call, Call))

    def between_blocks(self) -> None:
        """Raises Abandoned once every client of the forward that runs has left."""
        now = time.monotonic()
        if self._group and now > self._asked + _ASK_EVERY:
            self._asked = now
            if all(call.is_gone() for call in self._group):
                raise Abandoned

    def _enter(self, each: Call | Job) -> None:
        each.arrived = time.monotonic()
        self._spent[each.client] = max(self._spent.get(each.client, 0.0), self._clock)
        self._line.append(each)

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                first = self._next()
                try:
                    self._do_job(first) if isinstance(first, Job) else self._do_calls(first)
                except Exception as error:  # a fault of the role's code, of which whoever waits hears
                    log.exception("a request failed")
                    for each in {first, *self._group}:
                        if not each.outcome.done():
                            each.outcome.set_exception(Internal(f"{type(error).__name__}: {error}", "see the log"))
                finally:
                    self.since, self._group = None, []
                del first

    def _next(self) -> Call | Job:
        with self._changed:
            while not self._line:
                self._spent.clear()
                self._clock = 0.0
                self._changed.wait()
            now = time.monotonic()
            first = min(self._line, key=lambda each: (_comes_last(each, now), self._spent[each.client], each.arrived))
            self._line.remove(first)
            self._clock = max(self._clock, self._spent[first.client])
            return first

    def _do_job(self, job: Job) -> None:
        begun = time.monotonic()
        self.since = None, begun
        try:
            job.outcome.set_result(job.function())
        except BaseException as error:
            job.outcome.set_exception(error)
        self._charge(job.client, time.monotonic() - begun)

    def _do_calls(self, first: Call) -> None:
        if not self._admitted(first):
            return
        role, self._group = first.role, [first]
        group, size, key = self._group, role.batch_size(first.item), role.group_key(first.item)
        for call in self._waiting_for(role):
            if not self._admitted(call):
                self._leave(call)
                continue
            larger = size + role.batch_size(call.item)
            if role.group_key(call.item) == key and larger <= role.settings.batch_positions:
                self._leave(call)
                group.append(call)
                size = larger
        self._run(role, group)

    def _admitted(self, call: Call) -> bool:
        """Whether it still needs a forward; else it has its outcome, or nobody to give it to."""
        if call.is_gone():
            call.outcome.cancel()
            return False
        if call.admitted:
            return True
        try:
            reply = self._guard.run(call.role, lambda: call.role.admit(call.item))
        except LunaError as error:
            call.outcome.set_exception(error)
            return False
        if reply is not None:
            call.outcome.set_result(reply)
            return False
        call.admitted = True
        return True

    def _waiting_for(self, role: Role) -> list[Call]:
        with self._changed:
            return [each for each in self._line if isinstance(each, Call) and each.role is role]

    def _leave(self, call: Call) -> None:
        with self._changed:
            self._line.remove(call)

    def _run(self, role: Role, group: list[Call]) -> None:
        begun = time.monotonic()
        self._group, self.since = group, (role, begun)
        try:
            self._guard.ready(role)
            replies = self._guard.run(role, lambda: role.run([call.item for call in group]))
        except Abandoned:
            for call in group:
                call.outcome.cancel()
        except LunaError as error:
            if len(group) == 1:
                group[0].outcome.set_exception(error)
            else:
                # Together they failed: alone, only those at fault do.
                for call in group:
                    self._run(role, [call])
                return
        else:
            for call, reply in zip(group, replies, strict=True):
                call.outcome.set_result(reply)
        seconds = time.monotonic() - begun
        self._ran(role, len(group), seconds)
        sizes = [max(1, role.batch_size(call.item)) for call in group]
        for call, size in zip(group, sizes, strict=True):
            self._charge(call.client, seconds * size / sum(sizes))

    def _charge(self, client: str, seconds: float) -> None:
        with self._changed:
            self._spent[client] = self._spent.get(client, self._clock) + seconds


def _comes_last(each: Call | Job, now: float) -> bool:
    return isinstance(each, Job) and now - each.arrived < LATE_SECONDS
