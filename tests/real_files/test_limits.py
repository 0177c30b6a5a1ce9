"""Requests over a limit of ours: the client splits them, or the refusal says what to do."""

import random

import pytest
import torch

from engine.role import Item
from engine.roles.clip import ClipRole
from engine.settings import PatchedSettings
from luna_client import server as server_module
from luna_client.row_groups import in_groups, row_groups, rows_in_a_body
from luna_client.server import Server
from luna_protocol import MAX_BODY_BYTES
from luna_protocol.blob import pack, set_hash
from luna_protocol.errors import MAX_TEXT, Broken, Impossible, Malformed, OutOfMemory, TooLarge, from_json
from luna_protocol.messages import MAX_ROWS, ClipText, LoraUse, UNetForward
from tests import checkpoints
from tests.handlers.test_step_cache_in_batches import SHAPE, served  # noqa: F401
from tests.loras import file_of


@pytest.fixture
def worker(served):  # noqa: F811
    return served()


def tensors_of(rows, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 4, 8, 8, generator=draw),
        "timesteps": torch.full((rows,), 500.0),
        "context": torch.randn(rows, 77, SHAPE.context, generator=draw),
    }


def test_a_batch_of_33_with_cfg_keeps_cond_and_uncond_of_each_picture_together():
    groups = row_groups(66, 2, MAX_ROWS)
    assert [len(group) for group in groups] == [32, 34]
    assert sorted(row for group in groups for row in group) == list(range(66))
    assert all({row % 33 for row in group[: len(group) // 2]} == {row % 33 for row in group} for group in groups)


@pytest.mark.parametrize(("rows", "conds", "most"), [(140, 70, 64), (65, 65, 64), (64, 2, 64), (7, 2, 3), (5, 1, 1)])
def test_many_masked_conds_make_as_few_requests_as_hold_them(rows, conds, most):
    groups = row_groups(rows, conds, most)
    assert sorted(row for group in groups for row in group) == list(range(rows))
    assert max(map(len, groups)) <= most
    assert (len(groups) == 1) == (rows <= most)


def test_rows_come_back_in_their_order_whatever_the_server_has_room_for():
    rows, asked = torch.randn(12, 3), []

    def ask(group, name):
        asked.append((len(group), name))
        if len(group) > 5:
            raise OutOfMemory("cuda:0 has no memory left")
        return rows[group] * 2

    out, most = in_groups(ask, 12, 2, MAX_ROWS)
    assert torch.equal(out, rows * 2) and most == 3
    assert asked[:2] == [(12, ""), (6, "0 of 2")]
    assert [name for _, name in asked[2:]] == [f"{i} of 6" for i in range(6)]


def test_an_sdxl_controlnet_over_http_sends_cond_and_uncond_one_after_the_other():
    """At 1024 x 1024 in fp32 the two are 214,958,080 bytes of residuals alone."""
    levels = [(320, 128)] * 4 + [(640, 64)] * 3 + [(1280, 32)] * 3
    shapes = {f"output.{index}": (channels, side, side) for index, (channels, side) in enumerate(levels[:9])}
    shapes = {"x": (4, 128, 128), "context": (77, 2048), "middle.0": (1280, 32, 32), **shapes}
    two = {name: torch.empty(2, *shape, device="meta") for name, shape in shapes.items()}
    assert sum(tensor.nbytes for tensor in two.values()) > MAX_BODY_BYTES
    assert row_groups(2, 2, rows_in_a_body(two)) == [[0], [1]]
    halves = {name: tensor.half() for name, tensor in two.items()}
    assert row_groups(2, 2, rows_in_a_body(halves)) == [[0, 1]]


def test_a_single_row_that_is_too_large_is_refused_with_the_servers_words():
    def ask(group, name):
        raise TooLarge("214958080 bytes are more than the server takes", "config.properties: max_request_size")

    with pytest.raises(TooLarge, match="max_request_size"):
        in_groups(ask, 4, 2, MAX_ROWS)


def test_groups_of_an_evaluation_give_what_the_whole_gives(worker):
    whole = tensors_of(6)
    expected = worker.answer(pack(UNetForward(), whole))[0][1]["out"]

    def ask(group, name):
        return worker.answer(pack(UNetForward(), {key: each[group] for key, each in whole.items()}))[0][1]["out"]

    out, _ = in_groups(ask, 6, 2, 2)
    assert torch.allclose(out, expected, atol=1e-5)


def test_uploads_over_the_limit_of_a_body_come_one_after_the_other(worker, monkeypatch):
    """SDXL LoRAs of ComfyUI's folder, where HTTP carries tensors."""
    layer = {"diffusion_model.middle_block.1.proj_in": torch.Size([64, 64, 1, 1])}
    loras = [file_of("diff", layer, seed) for seed in range(5)]
    contents = [set_hash(tensors) for tensors in loras]
    own = {
        f"lora.{content}.{name}": each
        for content, ours in zip(contents, loras, strict=True)
        for name, each in ours.items()
    }
    request = UNetForward(lora=[LoraUse(content=content) for content in contents])
    sizes = []

    class Worker:
        def ask(self, blob, send):
            sizes.append(blob.size)
            [answer] = worker.answer(blob.pack())
            if isinstance(answer, Exception):
                raise answer
            return answer

    server = Server("http://elsewhere", "http://elsewhere", None)
    server.__dict__["_transport"] = Worker()
    whole = server.call("tiny.unet", request, tensors_of(1) | own)[1]["out"]
    assert len(sizes) == 2

    worker.model.role.take_loras(
        worker.model.role.unet.model, worker.model.role.overlays._files._targets
    )  # forgets them
    sizes.clear()
    limit = sum(each.nbytes for each in tensors_of(1).values()) + 2 * 64 * 64 * 4 + 1000
    monkeypatch.setattr(server_module, "MAX_BODY_BYTES", limit)
    monkeypatch.setattr(server_module, "MAX_HEADER_BYTES", 0)
    message, reply = server.call("tiny.unet", request, tensors_of(1) | own)
    assert torch.equal(reply["out"], whole)
    assert len(message["lora"]) == 5 and len(sizes) == 4
    assert max(sizes) < limit + 4000


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    checkpoints.write(home / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
    settings = PatchedSettings(role="clip", home=home, checkpoint="tiny.safetensors", dtype="fp32", family="sd15")
    made = ClipRole("tiny.clip", settings, torch.device("cpu"))
    made.load()
    return made


def test_texts_of_too_many_sections_are_refused_before_they_cost_a_worker(clip):
    clip.check(Item(ClipText(texts=["a fox " * 1000] * 4), {}))
    with pytest.raises(TooLarge, match=r"make \d+ sections of 77 tokens.*at most 256 .* fewer texts, or shorter"):
        clip.check(Item(ClipText(texts=["a fox " * 3000, *["a fox"] * 63]), {}))


STRAY = {
    "a misspelt tensor": ({"timestep": torch.ones(1)}, "unknown tensors came: timestep"),
    "a residual of no block": ({"control.input.99": torch.ones(1, 32, 8, 8)}, "control.input.99.* has .* input blocks"),
    "a residual of another size": ({"control.output.0": torch.ones(1, 32, 8, 8)}, r"control.output.0 has shape"),
    "a flat residual": ({"control.middle.0": torch.ones(1)}, r"control.middle.0 has shape \[1\]"),
}


@pytest.mark.parametrize("case", STRAY)
def test_tensors_that_nothing_would_use_are_named(worker, case):
    stray, message = STRAY[case]
    [error] = worker.answer(pack(UNetForward(), tensors_of(1) | stray))
    assert isinstance(error, Impossible) and error.status == 422
    with pytest.raises(Impossible, match=message):
        raise error


def test_residuals_of_every_place_fit_where_the_unet_adds_them(worker):
    shapes = worker.model.role.unet.control_shapes(9, 7)  # odd sides round up
    control = {
        f"control.{place}.{index}": torch.zeros(1, *shape)
        for place, all_of_it in shapes.items()
        for index, shape in enumerate(all_of_it)
    }
    odd = tensors_of(1) | {"x": torch.randn(1, 4, 9, 7)}
    [(_, plain)], [(_, controlled)] = (worker.answer(pack(UNetForward(), odd | more)) for more in ({}, control))
    assert torch.equal(plain["out"], controlled["out"])


def test_text_encoders_name_tensors_that_they_do_not_know(clip):
    with pytest.raises(Impossible, match="unknown tensors came: token"):
        clip.check(Item(ClipText(texts=["a fox"]), {"token": torch.ones(1, 77)}))


def test_a_refusal_never_echoes_more_than_a_screen(worker):
    """A blob of 20,000 names: the refusal used to be 469 KB, and the connection was reset before it was read."""
    names = {f"{random.Random(i).getrandbits(64):x}": torch.ones(1) for i in range(20_000)}
    [error] = worker.answer(pack(UNetForward(), tensors_of(1) | names))
    assert isinstance(error, Impossible) and "characters left out" in error.message
    assert len(error.message) <= MAX_TEXT and len(error.to_json()) < 2 * MAX_TEXT + 500
    assert str(from_json(error.to_json())) == str(error)
    assert Malformed("x" * MAX_TEXT).message == "x" * MAX_TEXT


def test_a_model_that_did_not_load_answers_with_a_fresh_error_each_time(worker):
    worker.model.role, worker.model.failure = None, Broken("changed under its feet", "load it again")
    for _ in range(3):
        [error] = worker.answer(pack(UNetForward(), tensors_of(1)))
        assert "changed under its feet" in error.message
    assert worker.model.failure.__traceback__ is None
