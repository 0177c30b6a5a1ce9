"""A real Prometheus scrapes a real server, and answers every question of the alerts and the dashboard."""

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
import urllib3
import yaml

from luna_client.server import Server
from luna_protocol.messages import UNetForward
from serving.torchserve import TorchServe
from tests.deploy.test_configurations import DEPLOY, expressions, needs


@pytest.mark.slow
def test_prometheus_knows_what_alerts_and_panels_ask(
    torchserve: TorchServe, server: Server, served_tiny: str, tmp_path: Path
) -> None:
    program = needs("prometheus")
    tensors = {"x": torch.ones(1, 4, 8, 8), "timesteps": torch.ones(1), "context": torch.ones(1, 77, 64)}
    for _ in range(3):
        server.call(f"{served_tiny}.unet", UNetForward(), tensors)
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    settings["global"]["scrape_interval"] = "1s"
    settings["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yaml")]
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{torchserve.ports.metrics}"]}]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL)

    def ask(question: str) -> dict:
        url = f"http://{address}/api/v1/query"
        try:
            answer = urllib3.request("GET", url, fields={"query": question}, retries=False, timeout=10)
        except urllib3.exceptions.HTTPError:
            return {"status": "starting", "data": {"result": []}}
        return json.loads(answer.data)

    try:
        deadline = time.monotonic() + 60
        own = f'sum(LunaRequests{{ModelName="{served_tiny}.unet",Outcome="ok"}})'
        while not (found := ask(own)["data"]["result"]):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert float(found[0]["value"][1]) >= 3
        assert ask('up{job="lunaserve"}')["data"]["result"][0]["value"][1] == "1"
        for expression in expressions():
            assert ask(expression)["status"] == "success", expression
    finally:
        process.kill()
        process.wait()
