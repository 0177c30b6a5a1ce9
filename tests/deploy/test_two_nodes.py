"""Two servers in network namespaces of their own behind a real HAProxy; one is killed in the middle of a picture."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import urllib3

from handlers.engine_link import served
from luna_client.faults import Unauthorized
from luna_client.manager import Timeouts
from luna_client.server import Server
from luna_protocol.messages import UNetForward
from serving.archives import pack_checkpoint
from tests.checkpoints import write
from tests.deploy.test_configurations import DEPLOY, ROOT, certificate, needs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="network namespaces need Linux and root"),
]
MODEL, TOKEN = "tiny.unet", "a proxy's token"


class Node:
    """serve.py in a namespace that the host reaches at `address`."""

    def __init__(self, number: int, home: Path) -> None:
        self.name, self.run = f"luna-test-{os.getpid()}-{number}", home / f"run{number}"
        self.host, self.address = f"10.77.{number}.1", f"10.77.{number}.2"
        self.inner, self.outer = f"lt{number}i", f"lt{number}o"
        ip("netns", "add", self.name)
        ip("link", "add", self.outer, "type", "veth", "peer", "name", self.inner, "netns", self.name)
        ip("addr", "add", f"{self.host}/24", "dev", self.outer)
        ip("link", "set", self.outer, "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", self.inner)
        ip("-n", self.name, "link", "set", self.inner, "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        temporary = home / f"tmp{number}"
        temporary.mkdir()
        enter = ["ip", "netns", "exec", self.name]
        self.process = subprocess.Popen(
            [
                *enter,
                sys.executable,
                ROOT / "scripts" / "serve.py",
                "--behind-proxy",
                "--run",
                self.run,
                "--only",
                "unet",
            ],
            env=os.environ | {"LUNA_HOME": str(home), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
            stdout=(home / f"output{number}").open("wb"),
            stderr=subprocess.STDOUT,
        )

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "serve.py ended"
        url = f"http://{self.address}:8080/predictions/{MODEL}"
        try:
            return urllib3.request("GET", url, retries=False, timeout=30).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def requests(self) -> int:
        return sum(worker.requests for worker in served(self.run).get(MODEL, []))

    def kill(self) -> None:
        """As if the machine lost its power: everything in the namespace, at once."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        self.kill()
        self.process.wait()
        subprocess.run(["ip", "link", "del", self.outer], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run([needs("ip"), *arguments], check=True, capture_output=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Node]]:
    file = write(tmp_path / "models" / "checkpoints" / "tiny.safetensors", "tiny_sd15")
    pack_checkpoint(file, tmp_path / "model_store", dtype="fp32", home=tmp_path)
    started: list[Node] = []
    try:
        for number in (1, 2):
            started.append(Node(number, tmp_path))
        deadline = time.monotonic() + 900
        while not all(node.is_ready() for node in started):
            assert time.monotonic() < deadline
            time.sleep(1)
        yield started
    finally:
        for node in started:
            node.remove()


@pytest.fixture
def proxy(nodes: list[Node], tmp_path: Path, monkeypatch) -> Iterator[str]:
    haproxy = needs("haproxy")
    certificate(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configuration = tmp_path / "haproxy.cfg"
    text = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
    configuration.write_text(text.replace("bind :8443", f"bind 127.0.0.1:{port}"))
    variables = {
        "LUNA_TOKEN": TOKEN,
        "LUNA_CERT": str(tmp_path / "both.pem"),
        "LUNA_NODE_1": f"{nodes[0].address}:8080",
        "LUNA_NODE_2": f"{nodes[1].address}:8080",
    }
    monkeypatch.setenv("LUNA_TOKEN", TOKEN)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    process = psutil.Popen([haproxy, "-f", configuration], env=os.environ | variables, stdout=subprocess.DEVNULL)
    try:
        time.sleep(6)  # its first checks
        yield f"https://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def picture(server: Server, between=lambda step: None, steps: int = 10) -> torch.Tensor:
    """A plain Euler loop, whose every step depends on the one before."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 4, 16, 16, generator=generator)
    context = torch.randn(1, 77, 64, generator=generator)
    for step in range(steps):
        between(step)
        tensors = {"x": x, "timesteps": torch.tensor([999.0 - 99 * step]), "context": context}
        x = x - 0.1 * server.call(MODEL, UNetForward(), tensors)[1]["out"]
    return x


def test_a_picture_survives_the_node_that_it_began_on(nodes: list[Node], proxy: str, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("LUNA_TOKEN")
    nowhere = "http://127.0.0.1:9"
    direct = [Server(f"http://{node.address}:8080", nowhere, tmp_path / "none") for node in nodes]
    expected = picture(direct[0])
    assert torch.equal(picture(direct[1]), expected)
    time.sleep(1.5)
    before = [node.requests() for node in nodes]

    monkeypatch.setenv("LUNA_TOKEN", TOKEN)
    client = Server(proxy, nowhere, timeouts=Timeouts(patience=120))
    assert torch.equal(picture(client), expected)
    time.sleep(1.5)
    served = [node.requests() - earlier for node, earlier in zip(nodes, before, strict=True)]
    assert max(served) >= 10 and min(served) <= 2, served  # probes aside, one node had it all

    victim = nodes[served.index(max(served))]
    told = []

    def kill(step: int) -> None:
        if step == 5:
            told.append(time.monotonic())
            victim.kill()
        elif step == 6:
            told.append(time.monotonic())

    assert torch.equal(picture(client, kill), expected)
    print(f"the step on the killed node took {told[1] - told[0]:.1f} s")

    monkeypatch.setenv("LUNA_TOKEN", "wrong")
    with pytest.raises(Unauthorized):
        Server(proxy, nowhere).call(MODEL, UNetForward(), {})
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert urllib3.request("GET", f"{proxy}/models", headers=headers, retries=False).status == 404
