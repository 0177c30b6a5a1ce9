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

from comfy_client.server import Server
from luna_protocol.blob import pack
from luna_protocol.messages import UNetForward, VaeDecode

EXAMPLES = int(os.environ.get("LUNA_FUZZ", "500"))

UNET = pack(UNetForward(), {"x": torch.ones(1, 4, 8, 8), "timesteps": torch.ones(1), "context": torch.ones(1, 2, 64)})
VAE = pack(VaeDecode(), {"latent": torch.ones(1, 4, 2, 2)})
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


BODIES = st.one_of(
    st.tuples(st.just("application/octet-stream"), mutated()),
    st.tuples(st.just("application/octet-stream"), st.binary(min_size=1, max_size=300)),
    st.tuples(st.just("application/json"), MESSAGES.map(lambda message: json.dumps(message).encode())),
    st.tuples(st.just("application/json"), st.binary(min_size=1, max_size=100)),
    st.tuples(st.sampled_from(["text/plain", "multipart/form-data; boundary=x", "x/y"]), mutated()),
)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_body_harms_the_server(server: Server, torchserve, served_tiny: str) -> None:
    models = [f"{served_tiny}.unet", f"{served_tiny}.vae", "repository"]
    before = {model: server.describe(model)["workers"][0]["pid"] for model in models}
    token = json.loads(torchserve.key_file.read_text())["inference"]["key"]
    http = urllib3.PoolManager(retries=False, timeout=120)
    seen: dict[int, int] = {}

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(models), BODIES)
    def ask(model: str, typed: tuple[str, bytes]) -> None:
        kind, body = typed
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
        response = http.request("POST", f"{torchserve.inference}/predictions/{model}", body=body, headers=headers)
        seen[response.status] = seen.get(response.status, 0) + 1
        # 200: a change to a tensor's values, or to nothing that counts, makes another good request.
        assert response.status == 200 or 400 <= response.status < 500, (response.status, response.data[:300])

    ask()
    print(seen)
    assert sum(count for status, count in seen.items() if status != 200) > EXAMPLES // 2
    assert {model: server.describe(model)["workers"][0]["pid"] for model in models} == before
    assert all(psutil.pid_exists(pid) for pid in before.values())
