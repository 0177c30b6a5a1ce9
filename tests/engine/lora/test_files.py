"""Reading LoRAs: names under roots, formats, and everything that can be wrong with a file or an upload."""

import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from engine.lora.files import LoraFiles, Source
from engine.lora.names import Targets
from luna_protocol.blob import set_hash
from luna_protocol.errors import Malformed, NotFound
from tests.loras import file_of

SHAPE = torch.Size([32, 64])
LAYERS = {"lora_unet_a": SHAPE, "lora_unet_b": SHAPE}
TARGETS = Targets({"lora_unet_a": "a.weight", "lora_unet_b": "b.weight"}, ("lora_te",))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "loras" / "styles").mkdir(parents=True)
    return tmp_path / "loras"


def files_of(root, capacity=1 << 30):
    return LoraFiles((root,), TARGETS, {"a.weight": SHAPE, "b.weight": SHAPE, "a.bias": SHAPE[:1]}, capacity)


def good(**changes):
    return file_of("lora", LAYERS) | changes


@pytest.mark.parametrize("name", ["styles/ink", "styles/ink.safetensors", "styles\\ink"])
def test_a_file_is_found_in_any_sub_folder_with_or_without_its_ending(root, name):
    save_file(good(), root / "styles" / "ink.safetensors")
    files = files_of(root)
    lora = files.get(files.source(name))
    assert lora.patches.keys() == {"a.weight", "b.weight"}
    assert lora.unmatched == ()


def test_peft_and_diffusers_endings_read_as_kohyas(root):
    up, down = file_of("lora without alpha", {"x": SHAPE}).values()
    for endings in (
        (".lora_B.weight", ".lora_A.weight"),
        (".lora_B.default.weight", ".lora_A.default.weight"),
        (".lora.up.weight", ".lora.down.weight"),
        ("_lora.up.weight", "_lora.down.weight"),
        (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    ):
        save_file({f"lora_unet_a{endings[0]}": up, f"lora_unet_a{endings[1]}": down}, root / "x.safetensors")
        files = files_of(root)
        patch = files.get(files.source("x")).patches["a.weight"]
        assert patch.kind == "lora" and patch.alpha is None
        assert torch.equal(patch.tensors["lora_up"], up) and torch.equal(patch.tensors["lora_down"], down)


def test_what_matches_nothing_is_named_and_other_parts_are_not_blamed(root):
    tensors = good(**file_of("lora", {"lora_unet_stranger": SHAPE, "lora_te_layer": SHAPE}))
    tensors["lora_unet_b.some_new_thing"] = torch.ones(2)
    save_file(tensors, root / "x.safetensors")
    files = files_of(root)
    lora = files.get(files.source("x"))
    assert sorted(lora.unmatched) == [
        "lora_unet_b.some_new_thing",
        "lora_unet_stranger.alpha",
        "lora_unet_stranger.lora_down.weight",
        "lora_unet_stranger.lora_up.weight",
    ]


def test_a_file_that_matches_nothing_patches_nothing_and_says_which_tensors(root):
    save_file(file_of("lora", {"lora_unet_stranger": SHAPE}), root / "stranger.safetensors")
    save_file(file_of("lora", {"lora_te_layer": SHAPE}), root / "text.safetensors")
    files = files_of(root)
    stranger = files.get(files.source("stranger"))
    assert not stranger.patches and len(stranger.unmatched) == 3
    text = files.get(files.source("text"))
    assert not text.patches and not text.unmatched


@pytest.mark.parametrize("name", ["../secret", "styles/../../secret", "/etc/passwd", "C:\\secret", "a\0b"])
def test_a_name_never_leads_out_of_the_root(root, name):
    save_file(good(), root.parent / "secret.safetensors")
    with pytest.raises(Malformed, match="leads out of its folder"):
        files_of(root).source(name)


def test_a_link_counts_as_the_file_it_leads_to(root):
    save_file(good(), root.parent / "elsewhere.safetensors")
    try:
        os.symlink(root.parent / "elsewhere.safetensors", root / "link.safetensors")
    except OSError:
        pytest.skip("this system lets no one make links")
    files = files_of(root)
    assert len(files.get(files.source("link")).patches) == 2


def test_an_unknown_name_says_where_it_was_looked_for(root):
    with pytest.raises(NotFound, match=r"no LoRA 'nowhere.safetensors'.*loras"):
        files_of(root).source("nowhere")


BAD = {
    "rank 0": (
        {"lora_unet_a.lora_up.weight": torch.ones(32, 0), "lora_unet_a.lora_down.weight": torch.ones(0, 64)},
        "the lora patch has rank 0",
    ),
    "wrong shape": (
        {"lora_unet_a.lora_up.weight": torch.ones(48, 4)},
        r"does not fit a weight of shape \[32, 64\]: the patch is \[48, 64\]",
    ),
    "ranks differ": ({"lora_unet_a.lora_up.weight": torch.ones(32, 5)}, "does not fit a weight"),
    "NaN": (
        {"lora_unet_a.lora_up.weight": torch.full((32, 4), float("nan"))},
        "lora_up has values that are not finite",
    ),
    "infinity": (
        {"lora_unet_b.lora_down.weight": torch.full((4, 64), float("inf"))},
        "lora_down has values",
    ),
    "alpha NaN": ({"lora_unet_a.alpha": torch.tensor(float("nan"))}, "alpha is"),
    "half a patch": ({"lora_unet_b.lora_up.weight": None}, "lora_down make no patch"),
    "the same tensor twice": ({"lora_unet_a.lora_B.weight": torch.ones(32, 4)}, "are the same tensor twice"),
    "integers": ({"lora_unet_a.lora_up.weight": torch.ones(32, 4).long()}, "lora_up is int64"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_layer_that_cannot_be_applied_is_left_out_and_named_and_the_others_stay(root, case):
    changes, message = BAD[case]
    tensors = {name: tensor for name, tensor in good(**changes).items() if tensor is not None}
    save_file(tensors, root / "bad.safetensors")
    files = files_of(root)
    bad = next(iter(changes)).split(".")[0]
    other = {"lora_unet_a": "b.weight", "lora_unet_b": "a.weight"}[bad]
    lora = files.get(files.source("bad"))
    assert lora.patches.keys() == {other} and lora.skipped.keys() == {bad}
    assert re.search(message, lora.skipped[bad])
    content = set_hash(tensors)
    files.receive(content, tensors)
    assert files.get(Source(content)).skipped.keys() == lora.skipped.keys()


def test_a_bias_that_the_model_lacks_leaves_the_weight_patched(root):
    save_file(good(**{"lora_unet_b.diff_b": torch.ones(32)}), root / "x.safetensors")
    files = files_of(root)
    lora = files.get(files.source("x"))
    assert lora.patches.keys() == {"a.weight", "b.weight"}
    assert lora.skipped == {"lora_unet_b": "b.bias is patched, but this model has none"}


def test_of_two_formats_on_one_layer_the_later_one_counts_as_in_comfyui(root):
    save_file(good(**file_of("loha", {"lora_unet_a": SHAPE})), root / "both.safetensors")
    files = files_of(root)
    lora = files.get(files.source("both"))
    assert lora.patches["a.weight"].kind == "loha" and not lora.skipped
    assert sorted(lora.unmatched) == ["lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"]


def test_a_pickle_and_a_cut_file_are_refused_unread(root):
    (root / "bad.safetensors").write_bytes(pickle.dumps({"lora_unet_a.lora_up.weight": 1}))
    torch.save(good(), root / "zip.safetensors")
    save_file(good(), root / "cut.safetensors")
    (root / "cut.safetensors").write_bytes((root / "cut.safetensors").read_bytes()[:-100])
    files = files_of(root)
    for name, message in (("bad", "pickle"), ("zip", "pickle"), ("cut", "its header says")):
        with pytest.raises(Malformed, match=message):
            files.get(files.source(name))


def test_a_changed_file_is_read_again_and_a_kept_one_survives_overwriting(root):
    path = root / "x.safetensors"
    save_file(good(), path)
    files = files_of(root)
    source = files.source("x")
    first = files.get(source)
    before = first.patches["a.weight"].tensors["lora_up"].clone()
    assert files.get(files.source("x")) is first
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(first.patches["a.weight"].tensors["lora_up"], before)
    save_file(file_of("lora", LAYERS, seed=9), path)
    again = files.source("x")
    assert again != source
    assert not torch.equal(files.get(again).patches["a.weight"].tensors["lora_up"], before)


def test_uploads_are_held_by_their_hash_alone(root):
    files = files_of(root)
    tensors = good()
    content = set_hash(tensors)
    assert files.get(Source(content)) is None
    with pytest.raises(Malformed, match=f"have|has the hash {content}"):
        files.receive("0" * 32, tensors)
    assert files.get(Source("0" * 32)) is None
    files.receive(content, tensors)
    assert files.get(Source(content)).patches.keys() == {"a.weight", "b.weight"}
    assert set_hash(dict(reversed(tensors.items()))) == content
    renamed = {name.replace("_a.", "_c."): tensor for name, tensor in tensors.items()}
    assert set_hash(renamed) != content


def test_the_least_recently_used_go_but_none_that_a_request_needs(root):
    loras = {seed: file_of("lora", LAYERS, seed) for seed in range(4)}
    sources = {seed: Source(set_hash(tensors)) for seed, tensors in loras.items()}
    size = sum(tensor.nbytes for name, tensor in loras[0].items() if not name.endswith("alpha"))
    files = files_of(root, capacity=2 * size)
    for seed, tensors in loras.items():
        files.receive(sources[seed].label, tensors)
    files.get(sources[0])
    files.trim(spare=list(sources.values()))
    assert all(files.get(source) for source in sources.values())
    files.get(sources[0])
    files.trim(spare=[sources[1]])
    assert [seed for seed, source in sources.items() if files.get(source)] == [0, 1]
