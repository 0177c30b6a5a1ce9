"""How a UNet's role runs requests with different LoRA stacks that came together."""

import pytest
import torch
from safetensors.torch import load_file

from engine.role import Item
from engine.roles.unet import UNetRole
from engine.settings import UNetSettings
from luna_protocol.blob import set_hash
from luna_protocol.errors import Malformed
from luna_protocol.messages import LoraUse, StepCache, UNetForward
from tests import checkpoints


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    checkpoints.write(home / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
    for seed in (2, 3):
        checkpoints.write_lora(home / "models" / "loras" / f"{seed}.safetensors", "tiny_sd15", seed=seed)
    return home


def handler(home, overlay_mb):
    settings = UNetSettings(
        role="unet", home=home, checkpoint="tiny.safetensors", lora_overlay_mb=overlay_mb, dtype="fp32"
    )
    made = UNetRole("tiny.unet", settings, torch.device("cpu"))
    made.load()
    return made


def item(handler, *names, rows=1, seed=0, **fields):
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "x": torch.randn(rows, 4, 8, 8, generator=draw),
        "timesteps": torch.full((rows,), 400.0),
        "context": torch.randn(rows, 77, 64, generator=draw),
    }
    made = Item(UNetForward(lora=[LoraUse(name=name) for name in names], **fields), tensors)
    assert handler.missing(made) == []
    handler.check(made)
    return made


def alone(handler, *items):
    with torch.inference_mode():
        return [handler.run([each])[0].tensors["out"] for each in items]


def run(handler, *items):
    assert len({handler.group_key(each) for each in items}) == 1
    with torch.inference_mode():
        return handler.run(list(items))


def test_stacks_of_one_batch_are_merged_one_by_one_where_they_fit(home):
    roomy = handler(home, 1024)
    items = [item(roomy, "2"), item(roomy, rows=2, seed=1), item(roomy, "3", seed=2), item(roomy, "2", seed=3)]
    replies = run(roomy, *items)
    assert not any(reply.message.unmerged for reply in replies)
    assert [[each.name for each in reply.message.lora] for reply in replies] == [["2"], [], ["3"], ["2"]]
    for reply, expected in zip(replies, alone(roomy, *items), strict=True):
        assert torch.allclose(reply.tensors["out"], expected, atol=1e-5)
    assert roomy.overlays.counters.merges == 2
    assert replies[0].counters["LoraMerges"] == 2 and replies[0].sizes["LoraOverlayBytes"] > 0


def test_stacks_that_do_not_fit_run_beside_the_weights_in_one_forward(home):
    roomy, tight = handler(home, 1024), handler(home, 0)
    items = [item(tight, "2"), item(tight, rows=2, seed=1), item(tight, "3", "2", seed=2)]
    replies = run(tight, *items)
    assert all(reply.message.unmerged for reply in replies)
    assert tight.overlays.counters.merges == 0 and replies[0].counters["LoraUnmergedForwards"] == 1
    for reply, expected in zip(replies, alone(roomy, *items), strict=True):
        assert reply.tensors["out"].shape == expected.shape
        assert (reply.tensors["out"] - expected).norm() / expected.norm() < 5e-6


def test_what_cannot_run_beside_the_weights_is_merged_whatever_the_room(home):
    tight = handler(home, 0)
    cached = StepCache(session="s", step=0, conds=["c"], policy="first_block")
    for items in (
        [item(tight, "2", hook_lora=[LoraUse(name="3")]), item(tight, "3", seed=1)],
        [item(tight, "2", step_cache=cached), item(tight, "3", seed=1)],
    ):
        replies = run(tight, *items)
        assert [reply.message.unmerged for reply in replies] == [False, True]
        expected = alone(tight, item(tight, "2", hook_lora=items[0].request.hook_lora), items[1])
        for reply, out in zip(replies, expected, strict=True):
            assert torch.allclose(reply.tensors["out"], out, atol=1e-5)


def test_a_merged_stack_stays_in_use_when_its_uploads_and_its_room_are_gone(home):
    """The device's memory filled up meanwhile, and other clients' LoRAs pushed the tensors out."""
    served = handler(home, 1024)
    tensors = load_file(home / "models" / "loras" / "2.safetensors")
    content = set_hash(tensors)
    first = item(served, "2")
    first.request.lora = [LoraUse(content=content)]
    first.tensors |= {f"lora.{content}.{name}": tensor for name, tensor in tensors.items()}
    assert served.missing(first) == []
    [merged] = run(served, first)
    served.overlays._fixed_budget, served.overlays._files._capacity = 0, 0
    served.overlays._files.trim()
    assert served.missing(first) == []
    [again] = run(served, first)
    assert torch.equal(again.tensors["out"], merged.tensors["out"])
    assert not again.message.unmerged and again.message.lora == merged.message.lora


def test_tensors_of_a_lora_that_nothing_names_are_refused(home):
    tight = handler(home, 0)
    with pytest.raises(Malformed, match="which no entry of the stack names"):
        tight.missing(Item(UNetForward(), {f"lora.{'0' * 32}.x.lora_up.weight": torch.ones(2, 2)}))
