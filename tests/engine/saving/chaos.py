"""Three clients save pictures while workers are killed at random and the disk fills once: none lost, none twice.

python -m tests.engine.saving.chaos --jobs 300 --kills 15 --workers 2   the long version; prints a JSON line
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import urllib3

from engine.saving.decode_queue import DecodeQueue
from luna_protocol.blob import pack
from luna_protocol.save_job import QueueStatus, SaveJob
from tests.engine.saving.save_jobs import a_job, check_each_done_once, latents
from tests.engine.saving.small_disk import filled, small_disk

ROOT = Path(__file__).parents[3]
CLIENTS = 3


class Workers:
    """Processes of queue_server.py that are started again whenever they are killed."""

    def __init__(self, home: Path, count: int, seconds: float):
        command = [sys.executable, "-m", "tests.engine.saving.queue_server", str(home), str(seconds)]
        self._start = lambda: subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.processes = [self._start() for _ in range(count)]
        self.ports = [int(process.stdout.readline()) for process in self.processes]

    def kill(self, *which: int) -> None:
        """Kills at one blow, and starts others."""
        for n in which:
            self.processes[n].kill()
        for n in which:
            self.processes[n].wait()
            self.processes[n].stdout.close()
            self.processes[n] = self._start()
        for n in which:
            self.ports[n] = int(self.processes[n].stdout.readline())

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()


class Client:
    """Sends jobs until each was accepted, to whichever worker answers, and remembers what it was told."""

    def __init__(self, name: str, workers: Workers, count: int, rng: random.Random):
        self.accepted: dict[str, list[str]] = {}
        self._workers, self._rng = workers, rng
        self._http = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(10))
        formats = ("png", "webp", "jpeg", "png16")
        self.jobs = [
            a_job(
                *rng.choices(formats, k=rng.randint(1, 3)),
                job_id=f"{name}-{n:06d}",
                client=name,
                filename="picture",
                priority=rng.randint(0, 1),
                save_mode="database_store",
            )
            for n in range(count)
        ]

    def run(self) -> None:
        for job in self.jobs:
            while not self._send(job):
                time.sleep(0.1)
            time.sleep(self._rng.uniform(0, 0.05))

    def _send(self, job: SaveJob) -> bool:
        body = bytes(pack(job, latents(job, rows=2, size=8, seed=hash(job.job_id) % 1000)))
        url = f"http://127.0.0.1:{self._rng.choice(self._workers.ports)}/"
        try:
            reply = self._http.request("POST", url, body=body)
        except urllib3.exceptions.HTTPError:
            return False
        if reply.status == 202:
            self.accepted[job.job_id] = json.loads(reply.data)["files"]
        elif reply.status != 503:
            raise AssertionError(f"{reply.status}: {reply.data!r}")
        return reply.status == 202


def chaos(home: Path, jobs: int, kills: int, workers: int, seconds: float, seed: int, fill: bool) -> dict:
    """Runs it all under `home` and checks what is left; the figures.

    Raises:
        AssertionError: a picture was lost, is partial, or is there twice.
    """
    rng = random.Random(seed)
    serving = Workers(home, workers, seconds)
    queue = DecodeQueue(home / "spool", home / "output")
    clients = [
        Client(f"client{n}", serving, len(range(n, jobs, CLIENTS)), random.Random(f"{seed} {n}"))
        for n in range(CLIENTS)
    ]
    begun = time.monotonic()
    threads = [threading.Thread(target=client.run) for client in clients]
    try:
        for thread in threads:
            thread.start()
        for kill in range(kills):
            wanted = jobs * (kill + 1) // (kills + 2)
            while queue.report(QueueStatus(limit=0)).counts["done"] < wanted:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.2))
            # Now one of them, now all at once, as when the server is killed.
            serving.kill(*(range(workers) if rng.random() < 0.3 else [rng.randrange(workers)]))
            if fill and kill == kills // 2:
                with filled(home):
                    time.sleep(2)
        for thread in threads:
            thread.join()
        until = time.monotonic() + 120 + jobs
        while (counts := queue.report(QueueStatus(limit=0)).counts)["done"] < jobs:
            assert time.monotonic() < until and not counts["dead"], counts
            time.sleep(0.1)
    finally:
        serving.end()
    took = time.monotonic() - begun
    jobs_sent = [job for client in clients for job in client.jobs]
    check_each_done_once(home / "output", queue, jobs_sent, f"sqlite:///{home / 'spool' / 'pictures.sqlite3'}")
    queue.close()
    return {"jobs": jobs, "kills": kills, "workers": workers, "disk_filled": fill, "seconds": round(took, 1)}


@contextlib.contextmanager
def maybe_small(folder: Path, megabytes: int) -> Iterator[bool]:
    """Mounts a small disk at `folder` if this user may; whether it did."""
    if os.name == "nt" or os.geteuid() != 0:
        yield False
        return
    with small_disk(folder, megabytes):
        yield True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.02, help="what a decode takes")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, maybe_small(Path(folder) / "home", 256) as fill:
        print(json.dumps(chaos(Path(folder) / "home", fill=fill, **vars(arguments))))


if __name__ == "__main__":
    main()
