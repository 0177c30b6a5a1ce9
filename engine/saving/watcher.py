"""Tells a program that watches the output folder about saved pictures, without ever holding up the queue."""

import json
import logging
import queue
import threading

import urllib3

log = logging.getLogger(__name__)


class Watcher:
    """Posts events as JSON to `url` from a thread of its own: five tries with back-off, at most `waiting` events in
    line.

    An event is a hint and may be lost with the process; the rows of `PictureRecords` are the truth.

    Attributes:
        lost: events that were given up, because the line was full or the watcher did not answer.
    """

    def __init__(self, url: str, waiting: int = 1000, backoff: float = 0.5):
        self.lost = 0
        self._url = url
        self._events: queue.Queue[dict | None] = queue.Queue(waiting)
        again = urllib3.Retry(5, status_forcelist=range(500, 600), allowed_methods=None, backoff_factor=backoff)
        self._http = urllib3.PoolManager(retries=again, timeout=5.0)
        self._thread = threading.Thread(target=self._post_all, name="watcher", daemon=True)
        self._thread.start()

    def tell(self, event: dict) -> None:
        """Hands over `event`, or counts it as lost when too many wait."""
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self.lost += 1

    def close(self, timeout: float = 5.0) -> None:
        """Waits for the events in line."""
        self._events.put(None)
        self._thread.join(timeout)

    def _post_all(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                reply = self._http.request("POST", self._url, body=json.dumps(event), headers=_HEADERS)
                if reply.status >= 400:
                    raise urllib3.exceptions.HTTPError(f"status {reply.status}")
            except urllib3.exceptions.HTTPError as error:
                self.lost += 1
                log.warning("the watcher at %s was not told of %s: %s", self._url, event, error)


_HEADERS = {"Content-Type": "application/json"}
