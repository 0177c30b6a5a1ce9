"""A process that accepts and does jobs of a spool, over HTTP: what a VAE's worker is, without TorchServe around it.

python -m tests.engine.saving.queue_server HOME SECONDS     decodes take SECONDS; prints its port when ready
"""

import http.server
import sys
import time
from pathlib import Path

from torch import Tensor

from engine.saving.decode_queue import DecodeQueue
from engine.saving.decode_worker import DecodeWorker
from engine.saving.picture_records import PictureRecords
from luna_protocol.blob import unpack
from luna_protocol.errors import LunaError
from luna_protocol.save_job import SaveJob
from tests.engine.saving.save_jobs import decode


def main(home: Path, seconds: float) -> None:
    queue = DecodeQueue(home / "spool", home / "output")
    records = PictureRecords(f"sqlite:///{home / 'spool' / 'pictures.sqlite3'}")

    def slow_decode(latent: Tensor) -> Tensor:
        time.sleep(seconds)
        return decode(latent)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message, tensors = unpack(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                status, body = 202, queue.submit(SaveJob(**message), tensors).model_dump_json().encode()
            except LunaError as error:
                status, body = error.status, error.to_json()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            """The test has its own."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    DecodeWorker(queue, slow_decode, records=records).start()
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
