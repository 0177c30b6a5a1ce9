import math

import pytest

from luna_protocol import errors
from luna_protocol.errors import Impossible, Internal, LunaError, Malformed, Unavailable, VersionMismatch, from_json
from luna_protocol.messages import ClipText, RepositoryIndex, UNetForward, VaeDecode, parse_request

ALL = (UNetForward, ClipText, VaeDecode, RepositoryIndex)


def test_a_request_is_found_by_its_kind():
    request = parse_request({"kind": "clip_text", "texts": ["a cat"], "clip_skip": -2}, ALL)
    assert request == ClipText(texts=["a cat"], clip_skip=-2)


@pytest.mark.parametrize(
    ("message", "kind", "told"),
    [
        ({}, Malformed, "unknown kind None"),
        ({"kind": ["unet_forward"]}, Malformed, "unknown kind"),
        ({"kind": "unet_forwards"}, Malformed, "answers clip_text"),
        ({"kind": "unet_forward", "sesion": "a"}, Malformed, "sesion"),
        ({"kind": "clip_text"}, Malformed, "texts"),
        ({"kind": "clip_text", "texts": "a cat"}, Malformed, "texts"),
        ({"kind": "clip_text", "texts": []}, Impossible, "texts"),
        ({"kind": "clip_text", "texts": ["a"], "clip_skip": 3}, Impossible, "clip_skip"),
        ({"kind": "vae_decode", "tiling": {"tile_size": 130}}, Impossible, "multiple of 8"),
        ({"kind": "unet_forward", "references": {"x": "../../etc"}}, Impossible, "references"),
        ({"kind": "unet_forward", "lora": [{"name": "a", "strength_patch": math.nan}]}, Impossible, "finite"),
        ({"kind": "unet_forward", "version": 1}, VersionMismatch, "version 1"),
        ({"kind": "unet_forward", "version": "1"}, VersionMismatch, "'1'"),
    ],
)
def test_what_is_wrong_is_named(message, kind, told):
    with pytest.raises(kind, match=told):
        parse_request(message, ALL)


@pytest.mark.parametrize("error", [Malformed("a", "b"), Unavailable("full", retry_after=2), Internal("x")])
def test_errors_survive_the_wire(error):
    told = from_json(error.to_json(), error.retry_after)
    assert (type(told), told.message, told.hint, told.retry_after) == (
        type(error),
        error.message,
        error.hint,
        error.retry_after,
    )


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"code": "teapot"}', b'{"message": "Worker died."}'])
def test_other_bodies_are_no_error_of_ours(body):
    assert from_json(body) is None


def test_every_kind_of_error_is_told_from_the_others():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LunaError)]
    kinds.remove(LunaError)
    assert [type(from_json(kind("a").to_json())) for kind in kinds] == kinds
