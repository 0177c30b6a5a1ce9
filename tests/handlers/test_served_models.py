"""What a real TorchServe answers for each role, against diffusers and transformers in this process."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import urllib3

from engine import tokenizer
from luna_protocol.blob import pack
from luna_protocol.errors import Impossible, LunaError, Malformed, NotFound, from_json
from luna_protocol.messages import ClipEncode, ClipText, Tiling, UNetForward, VaeDecode, VaeEncode
from serving.archives import pack_checkpoint
from tests import checkpoints, reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["tiny_sd15", "tiny_sdxl"])
def served(request, home, serve):
    """(shape, path, name) of a served checkpoint; its workers compute on one thread, and so does this process."""
    torch.set_num_threads(1)
    path = checkpoints.write(home / "models" / "checkpoints" / f"parity_{request.param}.safetensors", request.param)
    serve(path)
    with torch.inference_mode():
        yield request.param, path, path.stem


def inputs(shape: str, rows: int, sides: tuple[int, int], tokens: int) -> dict[str, torch.Tensor]:
    unet = checkpoints.SHAPES[shape].unet
    generator = torch.Generator().manual_seed(rows)
    tensors = {
        "x": torch.randn(rows, unet.in_channels, *sides, generator=generator),
        "timesteps": torch.linspace(7.25, 990, rows),
        "context": torch.randn(rows, tokens, unet.context, generator=generator),
    }
    if unet.y_features:
        tensors["y"] = torch.randn(rows, unet.y_features, generator=generator)
    return tensors


@pytest.mark.parametrize(("rows", "sides", "tokens"), [(1, (8, 8), 77), (3, (13, 9), 154), (4, (7, 12), 231)])
def test_unet_equals_diffusers(server, served, rows, sides, tokens):
    shape, path, name = served
    t = inputs(shape, rows, sides, tokens)
    theirs = reference.unet(path, shape)
    if shape == "tiny_sdxl":
        for module_name, module in theirs.named_modules():
            if module_name.endswith(".proj_in"):
                module.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    expected = theirs(t["x"], t["timesteps"], t["context"], class_labels=t.get("y")).sample
    _, reply = server.call(f"{name}.unet", UNetForward(), t)
    assert torch.equal(reply["out"], expected)


def test_text_encoders_equal_transformers(server, served):
    shape, path, name = served
    tokens = tokenizer.sections(["a photo of a cat", "word " * 160], pad=0).flatten(0, 1)
    for encoder in ("clip_l", "clip_g") if shape == "tiny_sdxl" else ("clip_l",):
        expected = reference.text_encoder(path, shape, encoder)(tokens, output_hidden_states=True)
        _, last = server.call(f"{name}.clip", ClipEncode(encoder=encoder), {"tokens": tokens})
        assert torch.equal(last["hidden"], expected.last_hidden_state)
        assert torch.equal(last["pooled"], expected.text_embeds)
        request = ClipEncode(encoder=encoder, layer="hidden", layer_index=-2, final_norm=False)
        _, hidden = server.call(f"{name}.clip", request, {"tokens": tokens})
        assert torch.equal(hidden["hidden"], expected.hidden_states[-2])


def test_plain_text_is_what_token_ids_give(server, served):
    shape, _, name = served
    several = shape == "tiny_sdxl"
    texts, hidden = ["a red circle, " * 30, "blue"], []
    for encoder, pad in (("clip_l", tokenizer.END), ("clip_g", 0))[: 1 + several]:
        ids = tokenizer.sections(texts, pad)
        layer = {"layer": "hidden", "layer_index": -2, "final_norm": False} if several else {}
        request = ClipEncode(encoder=encoder, projected=several, **layer)
        _, reply = server.call(f"{name}.clip", request, {"tokens": ids.flatten(0, 1)})
        hidden.append(reply["hidden"].unflatten(0, ids.shape[:2]).flatten(1, 2))
        pooled = reply["pooled"].unflatten(0, ids.shape[:2])[:, 0]
    _, text = server.call(f"{name}.clip", ClipText(texts=texts))
    assert text["hidden"].shape[1] == 2 * 77
    assert torch.equal(text["hidden"], torch.cat(hidden, dim=-1))
    assert torch.equal(text["pooled"], pooled)


def test_vae_equals_diffusers(server, served):
    shape, path, name = served
    theirs = reference.vae(path, shape)
    latent, pixels = torch.randn(2, 4, 9, 7), torch.randn(2, 3, 72, 56)
    _, decoded = server.call(f"{name}.vae", VaeDecode(), {"latent": latent})
    assert torch.equal(decoded["pixels"], theirs.decode(latent).sample)
    for strided in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
        _, encoded = server.call(f"{name}.vae", VaeEncode(), {"pixels": strided})
        assert torch.equal(encoded["latent"], theirs.encode(strided).latent_dist.mode())


def test_tiles_travel(server, served):
    _, _, name = served
    _, reply = server.call(
        f"{name}.vae", VaeDecode(tiling=Tiling(tile_size=128, overlap=32)), {"latent": torch.randn(1, 4, 33, 20)}
    )
    assert reply["pixels"].shape == (1, 3, 264, 160)
    _, reply = server.call(
        f"{name}.vae", VaeEncode(tiling=Tiling(tile_size=128, overlap=32)), {"pixels": torch.randn(1, 3, 264, 160)}
    )
    assert reply["latent"].shape == (1, 4, 33, 20)


def test_clients_that_meet_get_their_own_answers(server, served):
    """Whoever joins whom, everyone gets what they would get alone, up to the rounding of a larger batch."""
    shape, _, name = served
    requests = [inputs(shape, 1 + n % 2, (8, 8) if n % 3 else (6, 8), 77) for n in range(12)]
    alone = [server.call(f"{name}.unet", UNetForward(), tensors)[1]["out"] for tensors in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(
            pool.map(lambda tensors: server.call(f"{name}.unet", UNetForward(), tensors)[1]["out"], requests)
        )
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


BAD = {
    "wrong context width": ({"context": torch.zeros(1, 77, 12)}, Impossible, "context has shape"),
    "NaN timestep": ({"timesteps": torch.tensor([float("nan")])}, Impossible, "nan"),
    "rows that differ": ({"timesteps": torch.zeros(2)}, Impossible, "timesteps has shape"),
    "no channels": ({"x": torch.zeros(1, 3, 8, 8)}, Impossible, "3 channels"),
    "empty": ({"x": torch.zeros(1, 4, 0, 8)}, Impossible, "x has shape"),
    "missing tensor": ({"context": None}, Malformed, "'context' is missing"),
    "unknown control": ({"control.up.0": torch.zeros(1, 4, 8, 8)}, Malformed, "control.up.0"),
    "control that does not fit": (
        {"control.middle.0": torch.zeros(1, 1, 50, 50)},
        Impossible,
        "control.middle.0 has shape",
    ),
    "a dtype that is none": ({"x": torch.zeros(1, 4, 8, 8, dtype=torch.bool)}, Impossible, "bool"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_harms_nobody(server, served_tiny, case):
    change, kind, told = BAD[case]
    good = inputs("tiny_sd15", 1, (8, 8), 77)
    before = server.call(f"{served_tiny}.unet", UNetForward(), good)[1]["out"]
    bad = {name: tensor for name, tensor in (good | change).items() if tensor is not None}
    pids = {worker.pid for model in server.index().models for worker in model.workers}
    with pytest.raises(kind, match=told):
        server.call(f"{served_tiny}.unet", UNetForward(), bad)
    assert torch.equal(server.call(f"{served_tiny}.unet", UNetForward(), good)[1]["out"], before)
    assert {worker.pid for model in server.index().models for worker in model.workers} == pids


def post(torchserve, model: str, body: bytes, content_type="application/octet-stream"):
    key = json.loads(torchserve.key_file.read_text())["inference"]["key"]
    headers = {"Authorization": f"Bearer {key}", "Content-Type": content_type}
    return urllib3.request("POST", f"{torchserve.inference}/predictions/{model}", body=body, headers=headers)


def absurd() -> bytes:
    entry = {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 8]}
    meta = {"luna": json.dumps({"message": {"kind": "unet_forward"}})}
    header = json.dumps({"__metadata__": meta, "x": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"junk", 400),
        (b"\xff" * 64, 400),
        (bytes(pack(UNetForward(), {"x": torch.zeros(1, 4, 8, 8)}))[:-5], 400),
        (absurd(), 400),
        (bytes(pack(UNetForward(version=99), {})), 409),
    ],
    ids=["junk", "absurd header length", "cut off", "a shape of 10^18", "another version"],
)
def test_bodies_that_are_no_request(torchserve, server, served_tiny, body, status):
    answer = post(torchserve, f"{served_tiny}.unet", body)
    assert answer.status == status
    assert from_json(answer.data) is not None
    good = inputs("tiny_sd15", 1, (8, 8), 77)
    assert server.call(f"{served_tiny}.unet", UNetForward(), good)[1]["out"].shape == (1, 4, 8, 8)


def test_an_unknown_model(server):
    with pytest.raises(NotFound, match="nowhere"):
        server.call("nowhere.unet", UNetForward(), {})


def test_a_checkpoint_that_breaks_after_packing_is_told_by_every_answer(home, serve, server):
    path = checkpoints.write(home / "models" / "checkpoints" / "broken.safetensors", "tiny_sd15")
    pack_checkpoint(path, home / "model_store", None, "fp32", home)
    path.write_bytes(path.read_bytes()[:-100])
    server.register("broken.unet.mar")
    server.wait_ready(["broken.unet"])
    with pytest.raises(LunaError, match=r"did not load.*broken\.safetensors"):
        server.call("broken.unet", UNetForward(), inputs("tiny_sd15", 1, (8, 8), 77))
    states = {model.name: [worker.state for worker in model.workers] for model in server.index().models}
    assert states["broken.unet"] == ["failed"]
    server.unregister("broken.unet")


def test_the_documented_example_runs(torchserve, served_tiny):
    """docs/protocol.md shows a client in plain Python; this is it, word for word."""
    text = (ROOT / "docs" / "protocol.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    assert "protocol" not in re.findall(r"^(?:import|from) .*", code, re.MULTILINE)
    key = json.loads(torchserve.key_file.read_text())["inference"]["key"]
    run = [sys.executable, "-c", code, torchserve.inference, key, served_tiny]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 77, 64) (1, 4, 16, 16)"
