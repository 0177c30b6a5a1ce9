"""Looks after a running server: what TorchServe leaves undone while models come and go.

- Remembers what is registered, for the next start.
- Lets nobody wait for ever: requests that still waited when somebody scaled their model to 0 get a worker, until it has
  been idle for a while.

It works from the repository's index and the management API, so it does not matter whether a person, ComfyUI or curl
asked for the load.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from engine.private_files import replace_privately
from luna_client.manager import Manager
from luna_protocol.errors import LunaError
from luna_protocol.messages import Worker, validate
from luna_protocol.model_names import without_first
from luna_protocol.save_job import QueueReport, QueueStatus

log = logging.getLogger(__name__)

FINISH_SECONDS = 20.0
IDLE_SECONDS = 20.0
_REGISTERED = "registered.json"
EVERY_SECONDS = 10.0  # each time asks TorchServe about every model


@dataclass(frozen=True)
class Registered:
    """What is registered, as the archives are called.

    workers: how many each model has. One of the store that is not among them is new; one with 0 was unloaded.
    default_versions: which one answers to the plain name of a model that has several.
    """

    workers: dict[str, int] = field(default_factory=dict)
    default_versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, run: Path) -> "Registered":
        """What was written last; nothing, so that all is new, if nobody can tell."""
        try:
            return TypeAdapter(cls).validate_json((run / _REGISTERED).read_text("utf-8"))
        except FileNotFoundError:
            return cls()
        except ValueError as error:
            log.warning("%s is unreadable, so every model is loaded: %s", run / _REGISTERED, error)
            return cls()

    def updated(self, workers: dict[str, int], defaults: dict[str, str], stored: Iterable[str]) -> "Registered":
        """With what is registered now; what is `stored`, and is not, was unloaded. Of all else, it stays as it was."""
        ours = dict.fromkeys(map(without_first, stored), 0) | workers
        return Registered(self.workers | ours, self.default_versions | defaults)

    def write(self, run: Path) -> None:
        replace_privately(run / _REGISTERED, TypeAdapter(Registered).dump_json(self, indent=1).decode())


class Keeper:
    """Works in a thread of its own between `start` and `stop`.

    Args:
        serves: whether a model is this server's business; what is remembered of others stays as it is.
    """

    def __init__(self, server: Manager, run: Path, serves: Callable[[str], bool] = lambda model: True) -> None:
        self.server = server
        self.run = run
        self.serves = serves
        self._draining: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Remember what is registered now, let decode jobs that run come to their end, and end."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            self._guarded(self.remember)
            self._guarded(self.finish_jobs)

    def finish_jobs(self, seconds: float = FINISH_SECONDS) -> None:
        """Wait for the decode jobs that run now: a killed one loses no picture, but is done from its start again."""
        deadline = time.monotonic() + seconds
        running = self._running(QueueStatus(limit=1000))
        while running and time.monotonic() < deadline:
            time.sleep(0.2)
            running = self._running(QueueStatus(job_ids=running[:256]))

    def _running(self, question: QueueStatus) -> list[str]:
        report = validate(QueueReport, self.server.ask(question))
        return [job.job_id for job in report.jobs if job.state == "running"]

    def remember(self) -> None:
        """Write down what is registered, for the next start."""
        stored = self._stored()
        self._write_down(self._registered(), stored)

    def drain(self, wanted: dict[str, int]) -> None:
        """Answer those who wait for a model that has no workers any more."""
        for model, count in wanted.items():
            if not count:
                self._guarded(partial(self._answer_waiting, model))
        if not self._draining:
            return
        workers = {without_first(model.name): model.workers for model in self.server.index().models}
        for model in self._draining & workers.keys():
            if _is_idle(workers[model]):
                self._guarded(partial(self._end_answering, model))

    def _answer_waiting(self, model: str) -> None:
        if self.server.pending(model):
            log.warning("%s was scaled to 0 while requests waited: a worker answers them", model)
            self.server.scale(model, 1)
            self._draining.add(model)

    def _end_answering(self, model: str) -> None:
        if not self.server.pending(model):
            self.server.scale(model, 0)
            self._draining.remove(model)

    def _loop(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self._guarded(self._look_after)

    def _look_after(self) -> None:
        # Asked for once: TorchServe runs nvidia-smi for every description.
        stored = self._stored()
        now = self._registered()
        self._guarded(lambda: self._write_down(now, stored))
        self.drain(now.workers)

    def _stored(self) -> list[str]:
        # Before what is registered: what comes to the store in between is new, and not unloaded.
        return [model.name for model in self.server.index().models]

    def _write_down(self, now: Registered, stored: list[str]) -> None:
        known = Registered.read(self.run)
        known.updated(now.workers, now.default_versions, filter(self.serves, stored)).write(self.run)

    def _guarded(self, task: Callable[[], None]) -> None:
        try:
            task()
        except (LunaError, OSError) as error:
            # The server may be restarting its repository model; there is a next time.
            log.warning("the keeper could not do its work: %s", error)

    def _registered(self) -> Registered:
        workers, defaults = {}, {}
        for model in self.server.models():
            try:
                versions = self.server.describe_versions(model)
                if len(versions) > 1:
                    defaults[model] = self.server.describe(model)["modelVersion"]
            except LunaError as error:  # it went a moment ago, or has a name that no address can have
                log.warning("%r is registered, and nobody can look after it: %s", model, error)
                continue
            for version in versions:
                workers[without_first(f"{model}/{version['modelVersion']}")] = version["minWorkers"]
        return Registered(workers, defaults)


def _is_idle(workers: list[Worker]) -> bool:
    return all(not worker.busy and time.time() - worker.last_used > IDLE_SECONDS for worker in workers)
