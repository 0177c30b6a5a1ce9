"""Both ends of the transport in one process, and between them only what HTTP would carry."""

import gc
import json
import threading

import pytest
import torch

from engine.transport import Transport as WorkerTransport
from luna_client.transport import Answer, Body, Transport
from luna_protocol import JSON, shared_memory
from luna_protocol.blob import Blob
from luna_protocol.errors import Impossible, LunaError, NoSharedMemory
from luna_protocol.messages import UNetForward, UNetOutput

pytestmark = pytest.mark.skipif(
    not shared_memory.FOLDER.is_dir(), reason="no /dev/shm here; HTTP bodies carry the blobs"
)

LOCAL = "http://127.0.0.1:8080"


class Worker:
    """Answers a request with twice its x, `repeated` times over, and keeps the bodies that came."""

    def __init__(self):
        self.transport = WorkerTransport()
        self.bodies: list[Body] = []
        self.repeated = 1

    def __call__(self, body: Body) -> Answer:
        self.bodies.append(body)
        sent = body.fresh()
        row = json.loads(sent) if body.content_type == JSON else bytearray(sent)
        _, tensors = self.transport.receive(row)
        reply = Blob(UNetOutput(), {"out": torch.cat([tensors["x"] * 2] * self.repeated)})
        content_type, answer = self.transport.answer(row, reply)
        return Answer(content_type, bytes(answer))

    @property
    def by_memory(self) -> list[bool]:
        return [body.content_type == JSON for body in self.bodies]


def ask(transport: Transport, worker: Worker, x: torch.Tensor) -> torch.Tensor:
    message, tensors = transport.ask(Blob(UNetForward(), {"x": x}), worker)
    assert message["kind"] == "unet_output"
    return tensors["out"]


def segments() -> set[str]:
    return {path.name for path in shared_memory.FOLDER.iterdir()}


@pytest.fixture(autouse=True)
def _leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    yield
    gc.collect()
    assert not segments()


def test_tensors_go_through_memory_and_are_the_callers_own():
    transport, worker = Transport(LOCAL), Worker()
    first = ask(transport, worker, torch.ones(2, 3))
    second = ask(transport, worker, torch.full((2, 3), 5.0))
    assert worker.by_memory == [True, True]
    assert first.tolist() == [[2.0] * 3] * 2
    assert second.tolist() == [[10.0] * 3] * 2


def test_segments_are_reused_and_grow():
    transport, worker = Transport(LOCAL), Worker()
    seen = []
    for size in (10, 1 << 20, 10):
        assert torch.equal(ask(transport, worker, torch.ones(size)), torch.full((size,), 2.0))
        seen.append(segments())
    assert seen[0] & seen[1] and seen[0] != seen[1]
    assert all(len(names) == 2 for names in seen)


def test_a_reply_without_room_comes_as_a_body_and_has_room_the_next_time():
    transport, worker = Transport(LOCAL), Worker()
    worker.repeated = 4
    x, answers = torch.ones(1 << 17), []

    def noted(body: Body) -> Answer:
        answers.append(worker(body))
        return answers[-1]

    for _ in range(2):
        _, tensors = transport.ask(Blob(UNetForward(), {"x": x}), noted)
        assert tensors["out"].shape == (4 << 17,)
    assert [answer.content_type == JSON for answer in answers] == [False, True]


@pytest.mark.parametrize("address", ["http://192.168.1.20:8080", "http://gpu.example:8080"])
def test_another_machine_gets_bodies(address):
    transport, worker = Transport(address), Worker()
    assert ask(transport, worker, torch.ones(2)).tolist() == [2.0, 2.0]
    assert worker.by_memory == [False]


@pytest.mark.parametrize("address", ["http://localhost:8080", "http://127.0.0.2:8080", "http://[::1]:8080"])
def test_loopback_goes_by_memory(address):
    worker = Worker()
    ask(Transport(address), worker, torch.ones(2))
    assert worker.by_memory == [True]


def test_a_worker_that_cannot_map_ends_it_for_good(caplog, monkeypatch):
    transport, worker = Transport(LOCAL), Worker()

    def cannot(name, size):
        raise NoSharedMemory("no such file")

    monkeypatch.setattr(worker.transport._attachments, "view", cannot)
    for _ in range(2):
        assert ask(transport, worker, torch.ones(2)).tolist() == [2.0, 2.0]
    assert worker.by_memory == [True, False, False]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert LOCAL in caplog.text and "no such file" in caplog.text


def test_no_room_sends_this_call_by_body(caplog, monkeypatch):
    transport, worker = Transport(LOCAL), Worker()
    ask(transport, worker, torch.ones(2))
    with monkeypatch.context() as patched:
        patched.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert ask(transport, worker, torch.ones(1 << 20))[-1] == 2
    assert "No space left" in caplog.text
    ask(transport, worker, torch.ones(2))
    assert worker.by_memory == [True, False, True]


def test_memory_that_a_lost_worker_may_still_write_to_is_not_used_again():
    transport, worker = Transport(LOCAL), Worker()
    ask(transport, worker, torch.ones(2))
    used = segments()

    def twice(body: Body) -> Answer:
        worker(body)
        return worker(body)

    assert transport.ask(Blob(UNetForward(), {"x": torch.ones(2)}), twice)[1]["out"].tolist() == [2.0, 2.0]
    assert not used & segments()

    ask(transport, worker, torch.ones(2))
    used = segments()

    def fails(body: Body) -> Answer:
        body.fresh()
        raise Impossible("no")

    with pytest.raises(Impossible):
        transport.ask(Blob(UNetForward(), {"x": torch.ones(2)}), fails)
    assert not used & segments()


def test_calls_in_flight_together_do_not_share_memory():
    transport, worker = Transport(LOCAL), Worker()
    start, results = threading.Barrier(6), {}

    def call(index: int):
        def waiting(body: Body) -> Answer:
            start.wait(10)
            with lock:
                return worker(body)

        tensors = transport.ask(Blob(UNetForward(), {"x": torch.full((1000,), float(index))}), waiting)[1]
        results[index] = tensors["out"]

    lock = threading.Lock()
    threads = [threading.Thread(target=call, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], torch.full((1000,), 2.0 * index)) for index in range(6))
    assert len({body.fresh() for body in worker.bodies}) == 6


@pytest.mark.parametrize(
    "place",
    [
        {"request": "../../etc/passwd", "request_bytes": 100, "reply": "luna-1-0123456789abcdef", "reply_bytes": 0},
        {"request": "luna-1-0123456789abcdef", "request_bytes": 1 << 40, "reply": "luna-1-0123456789abcdef"},
        {},
        "luna-1-0123456789abcdef",
    ],
)
def test_a_senseless_descriptor_is_refused(place):
    with pytest.raises(LunaError) as told:
        WorkerTransport().receive({"shared_memory": place})
    assert told.value.code in ("malformed", "impossible")
