import os
import socket
import time

import pytest

from comfy_client.catalog import Catalog, Look, checkpoints, find, match_lora, replicas, spelt_once
from luna_client.server import Server
from luna_protocol.errors import NotFound, Unavailable
from luna_protocol.messages import Index, ServedModel

INDEX = Index(
    models=[
        ServedModel(name="repository", role="repository"),
        ServedModel(name="a.unet.1", role="unet", checkpoint="a.safetensors"),
        ServedModel(name="a.unet", role="unet", checkpoint="a.safetensors"),
        ServedModel(name="xl_b.unet", role="unet", checkpoint="xl/b.safetensors"),
        ServedModel(name="a.vae", role="vae", checkpoint="a.safetensors"),
        ServedModel(name="v1.5.unet/1.0", role="unet", checkpoint="v1.5.safetensors"),
        ServedModel(name="v1.5.unet/2.0", role="unet", checkpoint="v1.5.safetensors"),
        ServedModel(name="v1.5.unet.1/2.0", role="unet", checkpoint="v1.5.safetensors"),
    ]
)
LORAS = ["ink.safetensors", "styles/soft.safetensors", "people/soft.safetensors", "people/Ann.safetensors"]


def test_choices_are_files_once_each():
    assert checkpoints(INDEX, "unet") == ["a.safetensors", "v1.5.safetensors", "xl/b.safetensors"]
    assert checkpoints(INDEX, "clip") == []


def test_a_checkpoint_stands_for_its_first_replica():
    assert find(INDEX, "unet", "a.safetensors").name == "a.unet"
    assert find(INDEX, "unet", "v1.5.safetensors").name == "v1.5.unet/1.0"


@pytest.mark.parametrize(
    ("number", "names"),
    [
        (2, ["a.unet.1", "a.unet"]),
        (3, ["xl_b.unet"]),
        (5, ["v1.5.unet/1.0"]),
        (6, ["v1.5.unet/2.0", "v1.5.unet.1/2.0"]),
    ],
)
def test_replicas_are_of_one_model_and_version(number, names):
    assert [model.name for model in replicas(INDEX, INDEX.models[number])] == names


def test_what_is_not_served_is_told_with_what_is():
    told = r"no vae of .xl/b.safetensors. \(SD1.5 and SDXL can be served; it has: a.safetensors"
    with pytest.raises(NotFound, match=told):
        find(INDEX, "vae", "xl/b.safetensors")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("ink", "ink.safetensors"),
        ("ink.safetensors", "ink.safetensors"),
        ("styles\\soft", "styles/soft.safetensors"),
        ("Ann", "people/Ann.safetensors"),
        ("nk", None),
        ("ann", None),
    ],
)
def test_loras_are_found_by_path_or_name(wanted, found):
    assert match_lora(wanted, LORAS) == found


def test_a_name_in_two_folders_is_ambiguous():
    with pytest.raises(NotFound, match=r"'soft' could be people/soft.safetensors or styles/soft.safetensors"):
        match_lora("soft", LORAS)


def test_a_workflow_from_windows_names_the_same_file():
    assert find(INDEX, "unet", "xl\\b.safetensors").name == "xl_b.unet"


def test_a_file_of_both_sides_is_listed_once_as_comfyui_spells_it(monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    assert spelt_once(["xl/b.safetensors", "c.safetensors"], ["xl\\b.safetensors", "d.safetensors"]) == [
        "c.safetensors",
        "d.safetensors",
        "xl\\b.safetensors",
    ]
    monkeypatch.setattr(os, "sep", "/")
    assert spelt_once(["xl/b.safetensors"], ["xl/b.safetensors"]) == ["xl/b.safetensors"]


def test_nobody_waits_for_a_server_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server, catalog = Server(f"http://127.0.0.1:{silent.getsockname()[1]}"), Catalog()
        begun = time.monotonic()
        for _ in range(20):
            assert catalog.index(server) == Index(models=[])
        assert time.monotonic() - begun < 0.5
        assert catalog.refreshed(server, 0.2) == Index(models=[])
        assert time.monotonic() - begun < 1


class Answers(Server):
    """A server whose index is the next of these; an error is raised."""

    def __init__(self, *answers) -> None:
        super().__init__()
        self.answers = list(answers)

    def index(self) -> Index:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_what_was_last_seen_stays_while_the_server_is_away_and_goes_with_another_server(monkeypatch):
    monkeypatch.setattr("comfy_client.catalog._FRESH_SECONDS", 0.05)
    server, catalog = Answers(INDEX, Unavailable("away"), Index(models=[], loras=LORAS)), Catalog()
    seen = []
    for _ in range(3):
        seen.append(catalog.refreshed(server, 5))
        time.sleep(0.06)
    assert seen[:2] == [INDEX, INDEX] and seen[2].loras == LORAS
    assert catalog.index(Answers(Unavailable("away"))) == Index(models=[])


def test_a_workflow_waits_once_for_a_server_that_never_answers(monkeypatch):
    monkeypatch.setattr("comfy_client.catalog._SAME_WORKFLOW_SECONDS", 0.05)
    away, look = Unavailable("it did not answer within 10 s"), Look()
    server = Answers(INDEX, away, INDEX)
    assert look.now(server) == INDEX
    assert look.now(server) is look.now(server) is away
    time.sleep(0.06)
    assert look.now(server) == INDEX
