"""Whatever people type for an address works, or is refused in one sentence when it is used."""

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from luna_client.addresses import is_loopback, normal, parsed
from luna_client.faults import Unauthorized, Unreachable
from luna_client.manager import Manager, Timeouts
from luna_protocol.errors import Malformed, Unavailable

FAR = "2099-01-01T00:00:00"


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("localhost:8080/", "http://localhost:8080"),
        (" http://127.0.0.1:8080// ", "http://127.0.0.1:8080"),
        ('"127.0.0.1:8080"', "http://127.0.0.1:8080"),  # as `set X="..."` has it on Windows
        ("//gpu.example:8080", "http://gpu.example:8080"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("https://gpu.example/luna/", "https://gpu.example/luna"),
        ("HTTPS://gpu.example", "HTTPS://gpu.example"),
        ("gpu", "http://gpu"),
    ],
)
def test_addresses_as_people_write_them(given: str, means: str) -> None:
    assert normal(given) == means
    assert parsed(means).hostname


NONSENSE = ["", "ftp://x:1", "http://", "http:/127.0.0.1:8080", "::1", "::1:8080", "http://[::1", "x:port", "x:99999"]
NONSENSE += ["x:0", "two words:8080", "a\nb:80", "http://me:secret@x:1", "http://x:1?a=b", "http://x:1#a", "C:\\luna"]


@pytest.mark.parametrize("given", NONSENSE)
def test_nonsense_is_refused_when_it_is_used_and_not_before(given: str, tmp_path: Path) -> None:
    server = Manager(given, given, tmp_path / "none")
    for use in (server.index, server.models, server.ping):
        with pytest.raises(Malformed, match=r"is no address of a server.*give http://HOST:PORT"):
            use()


def test_a_host_that_cannot_be_is_no_server(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no server at"):
        Manager("http://a..b:8080", key_file=tmp_path / "none").index()


def test_which_addresses_are_this_machine_s() -> None:
    assert all(
        map(is_loopback, ["http://127.0.0.1:8080", "http://127.9.9.9", "https://[::1]:1", "http://localhost:8080"])
    )
    assert not any(
        map(is_loopback, ["http://localhost.evil.example", "http://127.0.0.1.evil.example", "http://10.0.0.1"])
    )
    assert not is_loopback("http://127.0.0.1@evil.example") and not is_loopback("nonsense here")


@contextmanager
def listening(answer: bytes = b'{"kind": "index", "models": []}') -> Iterator[tuple[str, list[str | None]]]:
    """An HTTP server, its address, and what it was sent as Authorization."""
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_DELETE = do_POST

        def log_message(self, *_) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def key_file(folder: Path, expires: str = FAR) -> Path:
    kinds = ("inference", "management", "API")
    file = folder / "key_file.json"
    file.write_text(json.dumps({kind: {"key": f"{kind}-key", "expiration time": expires} for kind in kinds}))
    return file


def test_no_scheme_a_path_and_slashes_reach_the_server(tmp_path: Path) -> None:
    with listening() as (address, seen):
        for given in (address, f"{address}/", f"http://{address}/behind/a/path/"):
            assert Manager(given, key_file=key_file(tmp_path)).index().models == []
        assert seen == ["Bearer inference-key"] * 3


def test_a_token_goes_only_where_it_may(tmp_path: Path) -> None:
    with listening() as (trusted, _), listening(b'{"models": []}') as (other, seen):
        may = frozenset({normal(trusted)})
        Manager(trusted, other, key_file(tmp_path), tokens_for=may).models()
        assert seen == [None]
        # The key that renews the others would go to the management address.
        expired = Manager(trusted, other, key_file(tmp_path, "2001-01-01T00:00:00"), tokens_for=may)
        with pytest.raises(Unauthorized, match=r"gets none, as it .* comes from ComfyUI's settings"):
            expired.index()
        assert seen == [None]


def test_a_server_that_takes_connections_and_never_answers_is_given_up_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        server = Manager(address, address, tmp_path / "none", Timeouts(question=0.3))
        for question in (server.index, server.models):
            with pytest.raises(Unavailable, match=r"did not answer within 0 s"):
                question()
