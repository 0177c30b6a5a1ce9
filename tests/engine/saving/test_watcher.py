"""The watcher is told of every picture, later if need be, and never holds anything up."""

import http.server
import json
import threading
import time

import pytest

from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.picture_records import PictureRecords
from engine.saving.watcher import Watcher
from tests.engine.saving.save_jobs import a_job, decode, latents, wait_for


class Listening:
    """An HTTP server that remembers events, after refusing the first `refused` posts."""

    def __init__(self, refused: int = 0, pause: float = 0):
        self.events, self.posts = [], 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.posts += 1
                time.sleep(pause)
                if outer.posts > refused:
                    outer.events.append(body)
                self.send_response(200 if outer.posts > refused else 503)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/picture"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def listening():
    made = []

    def make(**options):
        made.append(Listening(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_saved_pictures_are_told_after_their_rows(tmp_path, listening):
    watching = listening(refused=2)
    watcher = Watcher(watching.url, backoff=0.01)
    queue = DecodeQueue(tmp_path / "spool", tmp_path / "output")
    records = PictureRecords(f"sqlite:///{tmp_path / 'p.sqlite3'}")
    worker = DecodeWorker(queue, decode, records=records, watcher=watcher)
    worker.start()
    job, silent = a_job("png", save_mode="database_store"), a_job("png")
    for each in (job, silent):
        queue.submit(each, latents(each, rows=2))
    status = wait_for(queue, job)
    wait_for(queue, silent)
    worker.stop()
    watcher.close()
    told = [(event["path"], event["sha256"], event["job_id"]) for event in watching.events]
    assert told == [(file.path, file.sha256, job.job_id) for file in status.files]
    assert all(event["skip_metadata"] and event["run_ai_only"] for event in watching.events)
    assert watcher.lost == 0


def test_a_watcher_that_is_gone_or_slow_costs_nothing(listening):
    gone = Watcher("http://127.0.0.1:9/", backoff=0)
    begun = time.monotonic()
    gone.tell({"event": "x"})
    slow = listening(pause=0.2)
    behind = Watcher(slow.url, waiting=2)
    for _ in range(50):
        behind.tell({"event": "x"})
    assert time.monotonic() - begun < 0.2
    assert behind.lost >= 40
    gone.close()
    assert gone.lost == 1
    behind.close()
    assert len(slow.events) == 50 - behind.lost
