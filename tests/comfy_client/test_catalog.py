import pytest

from comfy_client.catalog import checkpoints, find, match_lora, replicas
from luna_protocol.errors import NotFound
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
    with pytest.raises(NotFound, match=r"no vae of 'xl/b.safetensors' \(it has: a.safetensors"):
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
