"""A reply that TorchServe would kill the worker for is an error of that one request."""

import re
from pathlib import Path

import pytest
import torch

from engine import transport
from engine.role import Reply
from handlers.answers import body_of
from luna_protocol import JSON
from luna_protocol.blob import Blob
from luna_protocol.errors import Malformed, TooLarge
from luna_protocol.messages import Readiness, Ready, parse_request

CONFIG = Path(__file__).resolve().parent.parent.parent / "config.properties"


def test_the_bound_is_torchserves() -> None:
    assert int(re.search(r"^max_response_size=(\d+)", CONFIG.read_text(), re.M)[1]) == transport.MAX_BODY_BYTES


def test_a_reply_above_it_is_refused_and_one_below_is_not(monkeypatch) -> None:
    reply = Blob(Ready(), {"pixels": torch.zeros(1000)})
    ours, body = transport.Transport(), bytearray(b"x")
    monkeypatch.setattr(transport, "MAX_BODY_BYTES", reply.size)
    assert len(ours.answer(body, reply)[1]) == reply.size
    monkeypatch.setattr(transport, "MAX_BODY_BYTES", reply.size - 1)
    with pytest.raises(TooLarge, match="the reply has"):
        ours.answer(body, reply)


@pytest.mark.parametrize("body", [None, [], {}, "", 0, False])
def test_json_that_says_nothing_is_no_probe(body) -> None:
    """As `null`, `[]` and the like arrive: a client that sends them has a fault, and hears of it."""
    with pytest.raises(Malformed):
        parse_request(transport.Transport().receive(body)[0], (Readiness,))


@pytest.mark.parametrize("row", [{}, {"body": b""}, {"data": None}])
def test_no_body_asks_for_readiness(row) -> None:
    ours, body = transport.Transport(), body_of(row)
    message, tensors = ours.receive(body)
    assert message == Readiness().model_dump() and tensors == {}
    assert transport.encoded(Reply(Ready(), {}), body, ours).content_type == JSON
