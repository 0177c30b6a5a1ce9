"""Whatever bytes come, the answer says what is wrong with them, at once, and the worker lives on.

`LUNA_FUZZ=20000` makes it the long run.
"""

import json
import os

import psutil
import pytest
import torch
import urllib3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from luna_client.server import Server
from luna_protocol.blob import METADATA_KEY, content_hash, pack
from luna_protocol.messages import (
    ClipEncode,
    ClipText,
    DescribeModel,
    LoraUse,
    StepCache,
    Tiling,
    UNetForward,
    VaeDecode,
    VaeEncode,
)
from luna_protocol.save_job import PictureGroup, QueueStatus, SaveJob

EXAMPLES = int(os.environ.get("LUNA_FUZZ", "500"))

X, LATENT, TOKENS = torch.ones(1, 4, 8, 8), torch.ones(1, 4, 2, 2), torch.ones(1, 77, dtype=torch.int64)
CONDITIONED = {"x": X, "timesteps": torch.ones(1), "context": torch.ones(1, 2, 64)}
UNET, VAE = pack(UNetForward(), CONDITIONED), pack(VaeDecode(), {"latent": LATENT})
JOB = SaveJob(job_id="fuzzed-job", groups=[PictureGroup(source="latent", tensor="latent")], created=0)
BLOB, JSON = "application/octet-stream", "application/json"
ROLES = ("unet", "clip", "vae", "repository")
EMBEDDED = {"embeddings": torch.ones(1, 64), "embedding_positions": torch.zeros(1, 2, dtype=torch.int64)}
REQUESTS = [
    ("unet", UNetForward(references={"x": content_hash(X)}), CONDITIONED),
    ("unet", UNetForward(lora=[LoraUse(name="absent")], hook_lora=[LoraUse(content="0" * 32)]), CONDITIONED),
    ("unet", UNetForward(step_cache=StepCache(session="s", step=0, conds=["c"])), CONDITIONED),
    ("clip", ClipEncode(encoder="clip_l", layer="hidden", layer_index=-2), {"tokens": TOKENS}),
    ("clip", ClipEncode(encoder="clip_l"), {"tokens": TOKENS} | EMBEDDED),
    ("clip", ClipText(texts=["a"], clip_skip=-2), {}),
    ("vae", VaeDecode(tiling=Tiling(tile_size=128)), {"latent": LATENT}),
    ("vae", VaeEncode(), {"pixels": torch.ones(1, 3, 8, 16)}),
    ("vae", JOB, {"latent": LATENT}),
    ("repository", QueueStatus(job_ids=["fuzzed-job"]), {}),
    ("repository", DescribeModel(model="absent"), {}),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
# Half of the header is JSON: bytes changed there make other requests, not only broken ones.
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=3)
)
MESSAGES = st.dictionaries(
    st.sampled_from(["kind", "version", "references", "lora", "step_cache", "tiling", "shared_memory", "model", "x"]),
    VALUES,
    max_size=5,
)


@st.composite
def mutated(draw) -> bytes:
    """A good blob with bytes changed, cut off, doubled or put in."""
    body = bytearray(draw(st.sampled_from([UNET, VAE])))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(body) - 1)))
        match draw(st.sampled_from(["change", "cut", "insert", "double", "length"])):
            case "change" if body:
                body[place] = draw(st.integers(0, 255))
            case "cut":
                del body[place:]
            case "insert":
                body[place:place] = draw(st.binary(max_size=16))
            case "double":
                body[place:place] = body[place : place + 64]
            case "length":
                body[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(body)


def jumbled(draw, value: object) -> object:
    """The same JSON with one thing in it replaced, doubled, put in or taken out."""
    match value:
        case dict() if value and draw(st.integers(0, 9)):
            key = draw(st.sampled_from(sorted(value)))
            rest = {other: each for other, each in value.items() if other != key}
            where = draw(st.sampled_from(["inside", "inside", "other name", "out"]))
            if where == "out":
                return rest
            name = key if where == "inside" else draw(st.text(max_size=8))
            return rest | {name: jumbled(draw, value[key])}
        case list() if value and draw(st.integers(0, 9)):
            place = draw(st.integers(0, len(value) - 1))
            instead = draw(st.sampled_from([[], value, [jumbled(draw, value[place])]]))
            return value[:place] + instead + value[place + 1 :]
        case _:
            return draw(VALUES)


@st.composite
def misbuilt(draw) -> tuple[str, str, bytes]:
    """A whole blob, whose message or tensors are not what they should be, to the role that answers such."""
    role, request, tensors = draw(st.sampled_from(REQUESTS))
    message = request.model_dump(mode="json")
    for _ in range(draw(st.integers(0, 2))):
        message = jumbled(draw, message)
        if isinstance(message, dict) and draw(st.integers(0, 9)):
            message["kind"] = request.kind
    sent = dict(tensors)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*tensors, "control.input.0", "y", "lora.0.x"]))
        match draw(st.sampled_from(["shape", "value", "dtype", "out"])):
            case "shape":
                sides = draw(st.lists(st.integers(0, 9), max_size=5))
                sent[name] = torch.zeros(sides, dtype=draw(st.sampled_from(DTYPES)))
            case "value" if name in sent and sent[name].numel():
                filled = draw(st.sampled_from([float("nan"), float("inf"), -1e30, 1e4, -1]))
                sent[name] = torch.full_like(sent[name].float(), filled).to(sent[name].dtype)
            case "dtype" if name in sent:
                sent[name] = sent[name].to(draw(st.sampled_from(DTYPES)))
            case _:
                sent.pop(name, None)
    strided = draw(st.sampled_from([[], list(sent), None, [1]]))
    return role, BLOB, save(sent, {METADATA_KEY: json.dumps({"message": message, "channels_last": strided})})


ANY = st.sampled_from(ROLES)
ASKED = st.one_of(
    *[misbuilt()] * 3,
    st.tuples(ANY, st.just(BLOB), mutated()),
    st.tuples(ANY, st.just(BLOB), st.binary(min_size=1, max_size=300)),
    st.tuples(ANY, st.just(JSON), MESSAGES.map(lambda message: json.dumps(message).encode())),
    st.tuples(ANY, st.just(JSON), st.binary(min_size=1, max_size=100)),
    st.tuples(ANY, st.sampled_from(["text/plain", "multipart/form-data; boundary=x", "x/y"]), mutated()),
)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_body_harms_the_server(server: Server, torchserve, served_tiny: str) -> None:
    models = {role: role if role == "repository" else f"{served_tiny}.{role}" for role in ROLES}
    before = {model: server.describe(model)["workers"][0]["pid"] for model in models.values()}
    token = json.loads(torchserve.key_file.read_text())["inference"]["key"]
    http = urllib3.PoolManager(retries=False, timeout=120)
    seen: dict[int, int] = {}

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(ASKED)
    def ask(asked: tuple[str, str, bytes]) -> None:
        role, kind, body = asked
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
        response = http.request(
            "POST", f"{torchserve.inference}/predictions/{models[role]}", body=body, headers=headers
        )
        seen[response.status] = seen.get(response.status, 0) + 1
        # A change to a tensor's values, or to nothing that counts, makes another good request.
        assert response.status in (200, 202) or 400 <= response.status < 500, (response.status, response.data[:300])

    ask()
    print(seen)
    assert sum(count for status, count in seen.items() if status >= 400) > EXAMPLES // 2
    assert {model: server.describe(model)["workers"][0]["pid"] for model in before} == before
    assert all(psutil.pid_exists(pid) for pid in before.values())
