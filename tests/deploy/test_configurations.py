"""What deploy/ holds is what the programs that it is for accept, and names only what exists."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
# Prometheus' own, and what it makes of a histogram.
_FUNCTIONS = {"sum", "by", "rate", "max", "increase", "deriv", "and", "offset"}
_LABELS = {"ModelName", "Outcome", "job", "model_name", "instance"}


def needs(program: str) -> str:
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


def certificate(folder: Path) -> tuple[Path, Path]:
    files = folder / "certificate.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = [needs("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    (folder / "both.pem").write_text(files[0].read_text() + files[1].read_text())
    return files


def checked(*command: str | Path, **environment: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_haproxy_takes_its_configuration(tmp_path):
    haproxy = needs("haproxy")
    certificate(tmp_path)
    variables = {"LUNA_TOKEN": "secret", "LUNA_CERT": str(tmp_path / "both.pem")}
    nodes = {"LUNA_NODE_1": "127.0.0.1:1", "LUNA_NODE_2": "127.0.0.1:2"}
    checked(haproxy, "-c", "-f", DEPLOY / "haproxy" / "haproxy.cfg", **variables, **nodes)


def test_nginx_takes_its_configuration(tmp_path):
    nginx = needs("nginx")
    chain, key = certificate(tmp_path)
    text = (DEPLOY / "nginx" / "lunaserve.conf").read_text()
    for ours, here in {
        "/etc/lunaserve/certificate.pem": chain,
        "/etc/lunaserve/key.pem": key,
        "/var/log/nginx": tmp_path,
    }.items():
        assert ours in text
        text = text.replace(ours, str(here))
    (tmp_path / "lunaserve.conf").write_text(text)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log; events {{}} http {{\n"
        'map $http_authorization $luna_allowed { default 0; "Bearer secret" 1; }\n'
        'map $host $luna_inference_token { default "inner"; }\n'
        f"include {tmp_path}/lunaserve.conf; }}\n"
    )
    checked(nginx, "-t", "-c", tmp_path / "nginx.conf")


def test_kubernetes_schemas_accept_the_manifests():
    manifests = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "lunaserve.yaml").read_text()))
    kinds = [manifest["kind"] for manifest in manifests]
    assert [kinds.count(kind) for kind in ("Deployment", "Service", "HorizontalPodAutoscaler")] == [3, 3, 3]
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.29", strict=True)


def test_the_schemas_would_notice_a_mistake():
    manifest = next(yaml.safe_load_all((DEPLOY / "kubernetes" / "lunaserve.yaml").read_text()))
    manifest["spec"]["accessMode"] = ["ReadWriteMany"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.29", strict=True)


def test_every_pod_probes_its_own_model_and_not_ping():
    for manifest in yaml.safe_load_all((DEPLOY / "kubernetes" / "lunaserve.yaml").read_text()):
        if manifest["kind"] == "Deployment":
            [container] = manifest["spec"]["template"]["spec"]["containers"]
            role = manifest["metadata"]["labels"]["role"]
            assert container["readinessProbe"]["httpGet"]["path"] == f"/predictions/sd15.{role}"
            assert role in container["args"]


def test_prometheus_takes_rules_and_configuration():
    checked(needs("promtool"), "check", "config", DEPLOY / "prometheus" / "prometheus.yaml")


def expressions() -> list[str]:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
    panels = json.loads((DEPLOY / "grafana" / "lunaserve.json").read_text())["panels"]
    return [rule["expr"] for rule in rules] + [target["expr"] for panel in panels for target in panel["targets"]]


def test_no_declaration_replaces_another():
    """YAML takes the last of two equal keys, and TorchServe then drops the other's metrics in silence."""
    text = (ROOT / "metrics.yaml").read_text().split("model_metrics:")[1]
    keys = re.findall(r"^  (\w+):", text, re.MULTILINE)
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("expression", expressions())
def test_alerts_and_panels_ask_for_metrics_that_are_declared(expression):
    declared = yaml.safe_load((ROOT / "metrics.yaml").read_text())
    names = {
        metric["name"]
        for group in ("ts_metrics", "model_metrics")
        for kind in declared[group].values()
        for metric in kind
    }
    bare = re.sub(r'"[^"]*"', "", expression)
    asked = set(re.findall(r"[A-Za-z_]\w{2,}", bare)) - _FUNCTIONS - _LABELS - {"up"}
    assert asked or "up" in expression
    assert {re.sub(r"_(sum|count|bucket)$", "", name) for name in asked} <= names
