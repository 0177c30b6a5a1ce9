"""The engine's door, by both kinds of socket: private, deaf to nonsense, and quick to notice who has left."""

import functools
import json
import os
import socket
import stat
import threading
import time

import pytest
import torch

from engine.door import Door
from engine.engine import Engine
from engine.unet import UNet
from luna_client.connections import Body
from luna_client.doors import Doors
from luna_client.faults import Aborted
from luna_protocol import BLOB
from luna_protocol.blob import pack, unpack
from luna_protocol.door import Connection, connect, listen
from luna_protocol.errors import from_json
from luna_protocol.messages import Index, Readiness, ServedModel, UNetForward, Worker
from tests import checkpoints


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    checkpoints.write(home / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
    return home


@pytest.fixture(scope="module", params=[True, False], ids=["unix", "tcp"])
def door(request, tmp_path_factory, home):
    folder = tmp_path_factory.mktemp("d", numbered=True)
    folder.chmod(0o700)
    engine = Engine("cpu")
    listening, address = listen(folder, unix=request.param)
    opened = Door(engine, listening, address, "the key")
    settings = {"role": "unet", "home": str(home), "family": "sd15", "checkpoint": "tiny.safetensors"}
    engine.hold("tiny.unet", settings, opened, 600)
    opened.engine = engine
    return opened


def step(rows=1):
    tensors = {"x": torch.ones(rows, 4, 8, 8), "timesteps": torch.full((rows,), 500.0)}
    return pack(UNetForward(), tensors | {"context": torch.ones(rows, 77, 64)})


def doors_of(door, seconds=60):
    worker = Worker(pid=1, state="ready", device="cpu", door=door.address)
    served = ServedModel(name="tiny.unet", role="unet", workers=[worker])
    doors = Doors("me", seconds)
    doors.exchange = functools.partial(doors.exchange, index=lambda: Index(models=[served]))
    return doors


def body():
    return Body(BLOB, 0, step)


def test_a_request_comes_back_answered(door):
    doors = doors_of(door)
    for _ in range(3):
        response = doors.exchange("tiny.unet", body())
        assert response.status == 200 and response.headers["Content-Type"] == BLOB
        assert unpack(bytearray(response.data))[1]["out"].shape == (1, 4, 8, 8)


def test_errors_come_back_as_they_are(door):
    response = doors_of(door).exchange("tiny.unet", Body(BLOB, 0, lambda: b"nonsense"))
    assert response.status == 400 and from_json(response.data).code == "malformed"


def test_a_model_that_is_not_there_is_the_other_ways_business(door):
    doors = doors_of(door)
    assert doors.exchange("other.unet", body()) is None
    doors._addresses["gone.unet"] = door.address
    assert doors.exchange("gone.unet", body()) is None


def test_a_closed_door_is_the_other_ways_business(door):
    doors = doors_of(door)
    place, _, secret = door.address.partition(" ")
    doors._addresses["tiny.unet"] = f"127.0.0.1:1 {secret}" if secret else f"{place}x"
    assert doors.exchange("tiny.unet", body()) is None
    assert doors.exchange("tiny.unet", body()).status == 200  # asked the index again


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff" * 12,
        (1 << 30).to_bytes(4, "little") + bytes(8),
        (4).to_bytes(4, "little") + bytes(8) + b"null",
        (4).to_bytes(4, "little") + bytes(8) + b"{{{{",
        (13).to_bytes(4, "little") + bytes(8) + b'{"op": "exec"}'[:13],
        (20).to_bytes(4, "little") + bytes(8) + b'{"op": "predict"}   ',
        (17).to_bytes(4, "little") + bytes(8) + b'{"op": "hold"}   ',
        b"abc",
        b"",
    ],
)
def test_nonsense_ends_its_own_connection_alone(door, frame):
    connection = connect(door.address, 10)
    connection._socket.sendall(frame)
    connection._socket.shutdown(socket.SHUT_WR)
    try:
        told, answer = connection.receive(10)
    except (EOFError, ConnectionError):
        pass
    else:
        assert told["status"] == 400 and json.loads(answer)["code"] == "malformed"
    connection.close()
    assert doors_of(door).exchange("tiny.unet", body()).status == 200


def test_the_door_is_private(door):
    place, _, secret = door.address.partition(" ")
    if not secret:
        assert stat.S_IMODE(os.stat(place).st_mode) == 0o600
        return
    assert place.startswith("127.0.0.1:") and len(bytes.fromhex(secret)) == 32
    stranger = socket.create_connection(("127.0.0.1", int(place.partition(":")[2])), 10)
    stranger.sendall(bytes(32))
    with pytest.raises((EOFError, ConnectionError)):
        connection = Connection(stranger)
        connection.send({"op": "status"})
        connection.receive(10)


class Slow:
    """Forwards that wait for a gate between two blocks, and are counted."""

    def __init__(self, monkeypatch):
        self.gate, self.begun, self.finished = threading.Event(), 0, 0
        forward, slow = UNet.forward, self

        def slowly(unet, *arguments, **more):
            slow.begun += 1
            while not slow.gate.wait(0.01):
                unet.between_blocks()
            out = forward(unet, *arguments, **more)
            slow.finished += 1
            return out

        monkeypatch.setattr(UNet, "forward", slowly)


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_request_whose_client_leaves_while_it_waits_does_not_run(door, monkeypatch):
    slow, answers = Slow(monkeypatch), []
    first = threading.Thread(target=lambda: answers.append(doors_of(door).exchange("tiny.unet", body())))
    first.start()
    until(lambda: slow.begun == 1)
    leaver = connect(door.address)
    # Of another shape, so that it could not join the first.
    leaver.send({"op": "predict", "model": "tiny.unet", "client": "leaver"}, step(rows=2))
    model = door.engine._models["tiny.unet"]
    until(lambda: door.engine.scheduler._waiting_for(model.role))
    leaver.close()
    slow.gate.set()
    first.join(20)
    assert answers[0].status == 200
    assert doors_of(door).exchange("tiny.unet", body()).status == 200
    assert slow.begun == slow.finished == 2


def test_a_forward_whose_client_cancels_ends_between_blocks(door, monkeypatch):
    slow, doors, failures = Slow(monkeypatch), doors_of(door), []

    def call():
        try:
            doors.exchange("tiny.unet", body())
        except Aborted as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    until(lambda: slow.begun == 1)
    doors.abort(thread.ident)
    thread.join(20)
    assert "aborted" in str(failures[0])
    until(lambda: door.engine.scheduler.since is None)
    assert slow.finished == 0
    slow.gate.set()
    assert doors.exchange("tiny.unet", body()).status == 200


def test_an_answer_that_does_not_come_is_a_time_out(door, monkeypatch):
    slow = Slow(monkeypatch)
    with pytest.raises(TimeoutError):
        doors_of(door, seconds=0.3).exchange("tiny.unet", body())
    slow.gate.set()


def test_status_says_what_is_there_and_where(door):
    connection = connect(door.address)
    connection.send({"op": "status"})
    told, _ = connection.receive(10)
    worker = told["models"]["tiny.unet"]
    assert worker["state"] == "ready" and worker["door"] == door.address and worker["resident"]
    connection.send({"op": "predict", "model": "tiny.unet", "json": True}, Readiness().model_dump_json().encode())
    assert connection.receive(10)[0]["status"] == 200


def test_clients_hold_nothing(door, home):
    settings = {"role": "clip", "home": str(home), "family": "sd15", "checkpoint": "tiny.safetensors"}
    for key in ({}, {"key": "another"}):
        connection = connect(door.address)
        connection.send({"op": "hold", "model": "tiny.clip", "settings": settings, "seconds": 60} | key)
        told, answer = connection.receive(10)
        assert told["status"] == 400 and b"only relays" in answer
    assert "tiny.clip" not in door.engine._models


def test_a_hold_lasts_as_long_as_its_connection_and_reports_metrics(door, home):
    settings = {"role": "clip", "home": str(home), "family": "sd15", "checkpoint": "tiny.safetensors"}
    connection = connect(door.address)
    connection.send({"op": "hold", "key": "the key", "model": "tiny.clip", "settings": settings, "seconds": 60})
    assert connection.receive(60)[0] == {"state": "loading"}
    assert connection.receive(60)[0] == {"state": "ready", "reason": ""}
    request = json.dumps({"kind": "clip_text", "texts": ["a"]}).encode()
    other = connect(door.address)
    other.send({"op": "predict", "model": "tiny.clip", "json": True}, request)
    assert other.receive(60)[0]["status"] == 200
    names = {each["name"] for each in connection.receive(10)[0]["metrics"]}
    assert {"LunaRequests", "LunaRunSeconds", "LunaMemoryBytes"} <= names
    connection.close()
    until(lambda: "tiny.clip" not in door.engine._models)
