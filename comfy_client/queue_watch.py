"""Follows the jobs that this ComfyUI has sent, and tells the browser when their pictures are there."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from luna_client.server import Server
from luna_protocol.messages import validate
from luna_protocol.save_job import JobStatus, QueueReport, QueueStatus

log = logging.getLogger(__name__)

_EVERY_SECONDS = 0.5
_AT_ONCE = 256  # as many jobs as one request may name


class QueueWatch:
    """A thread that runs while there are jobs to follow.

    Args:
        tell: `tell(event, message)` sends to the browser: "luna.saved" with job_id, node, files and thumbnails (JPEG,
            base64) when a job is done, "luna.warning" with its reason when some or all of it failed for good.
    """

    def __init__(self, tell: Callable[[str, dict[str, Any]], None]) -> None:
        self._tell = tell
        self._jobs: dict[str, tuple[Server, str]] = {}
        self._lock = threading.Lock()
        self._running = self._in_trouble = False

    def follow(self, server: Server, job_id: str, node: str) -> None:
        """Tell about this job, which `node` of the workflow has sent, once it has ended."""
        with self._lock:
            self._jobs[job_id] = server, node
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="luna queue watch", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_EVERY_SECONDS)
            with self._lock:
                jobs = dict(self._jobs)
                self._running = bool(jobs)
            if not jobs:
                return
            for server in {server for server, _ in jobs.values()}:
                own = [job for job, (asked, _) in jobs.items() if asked is server]
                for start in range(0, len(own), _AT_ONCE):
                    self._look(server, own[start : start + _AT_ONCE])

    def _look(self, server: Server, jobs: list[str]) -> None:
        try:
            report = validate(QueueReport, server.ask(QueueStatus(job_ids=jobs, thumbnails=True)))
            found = {job.job_id: job for job in report.jobs}
            for job_id in jobs:
                job = found.get(job_id)
                if job is None or job.state in ("done", "dead", "cancelled"):
                    with self._lock:
                        _, node = self._jobs.pop(job_id)
                    if job is not None:
                        self._ended(job, node)
            self._in_trouble = False
        except Exception as error:  # or the thread would end, and no job be told of any more
            level = logging.DEBUG if self._in_trouble else logging.WARNING
            log.log(level, "the jobs of %s cannot be followed just now: %s", server.inference, error)
            self._in_trouble = True

    def _ended(self, job: JobStatus, node: str) -> None:
        if job.state == "done":
            pictures = [file for file in job.files if file.kind == "picture"]
            self._tell(
                "luna.saved",
                {
                    "job_id": job.job_id,
                    "node": node,
                    "files": [file.path for file in pictures],
                    "thumbnails": [file.thumbnail for file in pictures if file.thumbnail],
                },
            )
        if job.state == "dead" or (job.state == "done" and job.reason):
            what = "was not saved" if job.state == "dead" else "is saved in part"
            self._tell("luna.warning", {"message": f"job {job.job_id[:8]} {what}: {job.reason}"})
