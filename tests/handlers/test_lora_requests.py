"""LoRA stacks through a real server: exact, reported, refused with a reason, and gone afterwards."""

import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import psutil
import pytest
import torch
import urllib3
from safetensors.torch import load_file, save_file

from engine.checkpoints import detect, read_header
from engine.lora.files import LoraFiles
from engine.lora.names import text_targets, unet_targets
from engine.lora.overlays import Overlays
from engine.text_encoder import TextEncoder
from engine.unet import UNet
from luna_protocol.blob import set_hash
from luna_protocol.errors import Impossible, LunaError, Malformed, NotFound
from luna_protocol.messages import ClipEncode, LoraUse, UNetForward
from tests import checkpoints

CPU = torch.device("cpu")
WEIGHT = "lora_unet_middle_block_1_proj_in"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def roots(home, served_tiny):
    folder = home / "models" / "loras"
    for name, seed in (("a", 2), ("styles/b", 3)):
        checkpoints.write_lora(folder / f"{name}.safetensors", "tiny_sd15", seed=seed)
    return folder


@pytest.fixture(scope="module")
def local(home, roots):
    """The same UNet here, to say what the server should answer."""
    path = home / "models" / "checkpoints" / "tiny.safetensors"
    unet = UNet.load(path, detect(read_header(path)).parts["unet"], torch.float32, CPU)
    return unet, _overlays(unet.model, unet_targets(unet.names), roots)


def _overlays(model, targets, roots):
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return Overlays(model, LoraFiles((roots,), targets, shapes, 1 << 30), 1 << 40)


INPUTS = {
    "x": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    "timesteps": torch.tensor([500.0]),
    "context": torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(2)),
}


def stack_of(*specs):
    return [LoraUse(name=name, strength_patch=strength) for name, strength in specs]


def ask(server, lora=(), hook_lora=(), **tensors):
    request = UNetForward.model_construct(lora=list(lora), hook_lora=list(hook_lora))
    return server.call("tiny.unet", request, INPUTS | tensors)


def expected(local, lora=(), hook_lora=()):
    unet, overlays = local
    with overlays.merged(overlays.stack(list(lora), list(hook_lora))):
        return unet.forward(*INPUTS.values())


STACKS = (
    [],
    [("a", 1.0)],
    [("styles/b", -0.7)],
    [("a", 0.5), ("styles/b", 0.8)],
    [("styles/b", 0.8), ("a", 0.5)],
    [("a", 0.0)],
)


@pytest.mark.parametrize("specs", STACKS, ids=str)
def test_a_stack_of_files_gives_what_merging_gives(server, local, specs):
    message, reply = ask(server, stack_of(*specs))
    assert torch.equal(reply["out"], expected(local, stack_of(*specs)))
    assert [(each["name"], each["unmatched"]) for each in message["lora"]] == [(name, 0) for name, _ in specs]
    assert all(each["matched"] > 30 for each in message["lora"])
    assert not message["unmerged"]


def test_hooks_are_a_second_stage(server, local):
    lora, hooks = stack_of(("a", 0.5)), stack_of(("styles/b", 0.8))
    message, reply = ask(server, lora, hooks)
    assert torch.equal(reply["out"], expected(local, lora, hooks))
    assert [each["name"] for each in message["lora"]] == ["a", "styles/b"]


def test_an_upload_is_sent_once_and_equals_the_file(server, local, roots):
    tensors = load_file(roots / "a.safetensors")
    tensors = {name: tensor * 1.25 if "lora_up" in name else tensor for name, tensor in tensors.items()}
    tensors["lora_unet_nowhere.lora_up.weight"] = torch.ones(2, 2)
    content = set_hash(tensors)
    sent = {f"lora.{content}.{name}": tensor for name, tensor in tensors.items()}
    message, reply = ask(server, [LoraUse(content=content)], **sent)
    assert torch.equal(reply["out"], _upscaled(local, roots))
    (report,) = message["lora"]
    assert report["content"] == content
    assert (report["unmatched"], report["unmatched_names"]) == (1, ["lora_unet_nowhere.lora_up.weight"])
    again = ask(server, [LoraUse(content=content)])
    assert torch.equal(again[1]["out"], reply["out"])
    other = ask(server, [LoraUse(content=content, strength_patch=0.3)])
    assert not torch.equal(other[1]["out"], reply["out"])


def _upscaled(local, roots):
    tensors = load_file(roots / "a.safetensors")
    for name in tensors:
        if "lora_up" in name:
            tensors[name] *= 1.25
    save_file(tensors, roots / "louder.safetensors")
    return expected(local, stack_of(("louder", 1.0)))


def test_a_file_replaced_on_the_server_is_read_again(server, local, roots):
    outs, fingerprints = [], set()
    for seed in (5, 6):
        checkpoints.write_lora(roots / "replaced.safetensors", "tiny_sd15", seed=seed)
        fingerprints |= {server.index().lora_fingerprints["replaced.safetensors"] for _ in range(2)}
        _, reply = ask(server, stack_of(("replaced", 1.0)))
        assert torch.equal(reply["out"], expected(local, stack_of(("replaced", 1.0))))
        outs.append(reply["out"])
    assert not torch.equal(*outs) and len(fingerprints) == 2


@pytest.fixture(scope="module")
def bad_files(roots):
    good = load_file(roots / "a.safetensors")
    up = good[f"{WEIGHT}.lora_up.weight"]
    (roots / "pickle.safetensors").write_bytes(pickle.dumps(list(range(9))))
    for name, change in {
        "wrong_shape": {f"{WEIGHT}.lora_up.weight": torch.ones(7, up.shape[1], 1, 1)},
        "rank_0": {
            f"{WEIGHT}.lora_up.weight": torch.ones(64, 0, 1, 1),
            f"{WEIGHT}.lora_down.weight": torch.ones(0, 64, 1, 1),
        },
        "nan": {f"{WEIGHT}.lora_up.weight": torch.full_like(up, float("nan"))},
    }.items():
        save_file(good | change, roots / f"{name}.safetensors")
    checkpoints.write_lora(roots / "sdxl.safetensors", "tiny_sdxl")
    save_file({f"lora_unet_x.{name}": torch.ones(2) for name in "abc"}, roots / "nothing.safetensors")


BAD = {
    "../checkpoints/tiny": (Malformed, "leads out of its folder"),
    "/etc/passwd": (Malformed, "leads out of its folder"),
    "absent": (NotFound, "no LoRA 'absent.safetensors'"),
    "pickle": (Malformed, "is a pickle checkpoint"),
}
SKIPPED = {"wrong_shape": "does not fit a weight of shape", "rank_0": "has rank 0", "nan": "not finite"}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_reason_and_leaves_nothing(server, local, bad_files, name):
    kind, told = BAD[name]
    with pytest.raises(kind, match=told):
        ask(server, stack_of(("a", 0.5), (name, 1.0)))
    assert torch.equal(ask(server)[1]["out"], expected(local))


@pytest.mark.parametrize("name", SKIPPED)
def test_a_layer_that_cannot_be_applied_is_left_out_and_reported(server, local, bad_files, name):
    message, reply = ask(server, stack_of(("a", 0.5), (name, 1.0)))
    assert torch.equal(reply["out"], expected(local, stack_of(("a", 0.5), (name, 1.0))))
    good, bad = message["lora"]
    assert (good["skipped"], bad["skipped"]) == (0, 1)
    assert bad["matched"] == good["matched"] - 1
    assert bad["skipped_layers"][0].startswith(f"{WEIGHT}: ") and SKIPPED[name] in bad["skipped_layers"][0]


def test_a_lora_that_fits_nothing_gives_the_base_and_says_so(server, local, bad_files):
    message, reply = ask(server, stack_of(("nothing", 1.0)))
    assert torch.equal(reply["out"], expected(local))
    (report,) = message["lora"]
    assert (report["matched"], report["unmatched"]) == (0, 3)


def test_what_no_request_may_say_is_refused(server, local):
    def raw(lora):
        unchecked = [LoraUse.model_construct(**each) for each in lora]
        return ask(server, unchecked)

    use = {"name": "a"}
    for lora, told in (
        ([use] * 4097, "at most 4096"),
        ([use | {"strength_patch": float("nan")}], "finite number"),
        ([use | {"strength_model": float("inf")}], "finite number"),
        ([use | {"content": "0" * 32}], "either by name or by content"),
        ([{}], "either by name or by content"),
    ):
        with pytest.raises(Impossible, match=told):
            raw(lora)
    assert torch.equal(ask(server)[1]["out"], expected(local))


def test_an_upload_under_a_wrong_hash_is_refused_and_not_kept(server, local, roots):
    tensors = load_file(roots / "a.safetensors")
    wrong = "0" * 32
    sent = {f"lora.{wrong}.{name}": tensor for name, tensor in tensors.items()}
    for _ in range(2):
        with pytest.raises(Malformed, match=f"their content has the hash {set_hash(tensors)}"):
            ask(server, [LoraUse(content=wrong)], **sent)
    assert torch.equal(ask(server)[1]["out"], expected(local))


def test_a_forward_that_fails_leaves_the_base(server, local):
    with pytest.raises(LunaError):
        ask(server, stack_of(("a", 1.0)), **{"control.input.0": torch.ones(1, 7, 8, 8)})
    assert torch.equal(ask(server)[1]["out"], expected(local))


def test_text_encoders_take_the_same_stacks(server, home, roots):
    path = home / "models" / "checkpoints" / "tiny.safetensors"
    encoder = TextEncoder.load(path, detect(read_header(path)).parts["clip"], "clip_l", torch.float32, CPU)
    module = torch.nn.ModuleDict({"clip_l": encoder.model})
    overlays = _overlays(
        module, text_targets({"clip_l": [name for name, _ in encoder.model.named_parameters()]}), roots
    )
    tokens = torch.tensor([[49406, 320, 2368, 49407] + [49407] * 73])
    lora = stack_of(("a", 0.8), ("styles/b", -0.5))
    for stack in ([], lora, lora[::-1]):
        with overlays.merged(overlays.stack(stack)):
            hidden, pooled = encoder.encode(tokens)
        message, reply = server.call("tiny.clip", ClipEncode(encoder="clip_l", lora=stack), {"tokens": tokens})
        assert torch.equal(reply["hidden"], hidden) and torch.equal(reply["pooled"], pooled)
        assert [each["matched"] for each in message["lora"]] == [12] * len(stack)


def test_merges_and_hits_are_counted(server, torchserve):
    for _ in range(3):
        ask(server, stack_of(("a", 0.123)))
    body = urllib3.request("GET", f"{torchserve.metrics}/metrics").data.decode()
    for name in ("LoraMerges", "LoraMergeSeconds", "LoraOverlayHits", "LoraOverlayBytes"):
        values = [
            float(line.split()[-1]) for line in body.splitlines() if line.startswith(name) and "tiny.unet" in line
        ]
        assert values and sum(values) > 0, name


@pytest.mark.slow
def test_a_thousand_requests_from_eight_clients_change_nothing(server, local, home, roots):
    path = home / "models" / "checkpoints" / "tiny.safetensors"
    file_hash = blake2b(path.read_bytes()).hexdigest()
    answers = [expected(local, stack_of(*specs)) for specs in STACKS]
    # The last one is of strength zero; two orders of a stack are close, yet they too round differently.
    assert all((answers[0] - other).abs().max() > 1e-2 for other in answers[1:-1])

    def client(seed):
        draw = random.Random(seed)
        wrong = 0
        for _ in range(125):
            which = draw.randrange(len(STACKS))
            out = ask(server, stack_of(*STACKS[which]))[1]["out"]
            # Requests that run as one batch differ from lone ones in the last bits; another stack is far away.
            wrong += not torch.allclose(out, answers[which], rtol=0, atol=1e-5)
        return wrong

    with ThreadPoolExecutor(8) as clients:
        assert sum(clients.map(client, range(8))) == 0
    assert torch.equal(ask(server)[1]["out"], answers[0])
    assert blake2b(path.read_bytes()).hexdigest() == file_hash


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_merge_comes_back_with_the_base(server, local, home, roots):
    path = home / "models" / "checkpoints" / "tiny.safetensors"
    file_hash = blake2b(path.read_bytes()).hexdigest()

    def long_stack(strength):
        return stack_of(*[("a", strength), ("styles/b", -strength)] * 32)

    started = time.perf_counter()
    ask(server, long_stack(0.01))
    merging = time.perf_counter() - started
    (model,) = [model for model in server.index().models if model.name == "tiny.unet"]
    pid = model.workers[0].pid
    timer = threading.Timer(merging / 2, psutil.Process(pid).kill)
    timer.start()
    # The client tries again until the worker is back.
    _, reply = ask(server, long_stack(0.02))
    timer.join()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert torch.equal(reply["out"], expected(local, long_stack(0.02)))
    assert torch.equal(ask(server)[1]["out"], expected(local))
    assert blake2b(path.read_bytes()).hexdigest() == file_hash
