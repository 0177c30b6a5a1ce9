"""LoRA patches as packs add them, evaluations of many rows, and what a failed run leaves behind."""

import re

import pytest
import torch

from tests.comfyui.comfyui import ComfyUI, Graph, Output, RunFailed
from tests.comfyui.workflows import empty, encode, local, remote, sample

pytestmark = pytest.mark.slow

CHECKPOINT = "sd15.safetensors"
ATTENTION = {"q": 1.1, "k": 0.9, "v": 1.05, "out": 0.8}


def by_block(g: Graph, model: Output) -> Output:
    return g("TestLoraByBlock", model=model, lora_name="a.safetensors", all_different=False)


def by_layer_over_a_lora(g: Graph, model: Output) -> Output:
    below = g("LoraLoaderModelOnly", model=model, lora_name="b.safetensors", strength_model=0.6)
    return g("TestLoraByBlock", model=below, lora_name="a.safetensors", all_different=True)


def every_form(g: Graph, model: Output) -> Output:
    return g("TestEveryForm", model=model)


def attention_multiply(g: Graph, model: Output) -> Output:
    lora = g("LoraLoaderModelOnly", model=model, lora_name="a.safetensors", strength_model=0.7)
    return g("UNetCrossAttentionMultiply", model=g("UNetSelfAttentionMultiply", model=lora, **ATTENTION), **ATTENTION)


@pytest.mark.parametrize("patched", (by_block, by_layer_over_a_lora, every_form, attention_multiply))
def test_patches_of_packs_give_comfyuis_own_bits(patched, comfyui: ComfyUI) -> None:
    latents = {}
    for load in (local, remote):
        g = Graph()
        model, clip, _ = load(g, CHECKPOINT)
        conds = encode(g, clip)
        g.save(sample(g, model, conds, empty(g)), "plain")
        g.save(sample(g, patched(g, model), conds, empty(g)), "patched")
        latents[load] = comfyui.run(g).latents
    assert torch.equal(latents[local]["patched"], latents[remote]["patched"])
    assert not torch.allclose(latents[local]["patched"], latents[local]["plain"], atol=1e-3)


def test_clips_attention_is_multiplied_too(comfyui: ComfyUI) -> None:
    latents = {}
    for load in (local, remote):
        g = Graph()
        model, clip, _ = load(g, CHECKPOINT)
        conds = encode(g, g("CLIPAttentionMultiply", clip=clip, **ATTENTION))
        g.save(sample(g, model, conds, empty(g)), "latent")
        latents[load] = comfyui.run(g).latents["latent"]
    assert torch.equal(latents[local], latents[remote])


def test_a_merge_of_a_local_model_into_a_remote_one_is_refused_by_name(comfyui: ComfyUI) -> None:
    g = Graph()
    model, clip, _ = remote(g, CHECKPOINT)
    merged = g("TestMergeOfAnother", model=model, other=local(g, CHECKPOINT)[0])
    g.save(sample(g, merged, encode(g, clip), empty(g)), "never")
    with pytest.raises(RunFailed, match=r"The merge of another model into diffusion_model.*ModelMergeSimple"):
        comfyui.run(g)


def batch_of_33(g: Graph, conds: tuple[Output, Output]) -> tuple[tuple[Output, Output], Output]:
    return conds, empty(g, 64, 64, batch=33)


def sixty_five_conds(g: Graph, conds: tuple[Output, Output]) -> tuple[tuple[Output, Output], Output]:
    return (g("TestManyConds", conditioning=conds[0], count=64), conds[1]), empty(g, 64, 64)


@pytest.mark.parametrize("large", (batch_of_33, sixty_five_conds))
def test_more_rows_than_a_request_takes_are_split(large, comfyui: ComfyUI) -> None:
    latents = {}
    for load in (local, remote):
        g = Graph()
        model, clip, _ = load(g, CHECKPOINT)
        conds, latent = large(g, encode(g, clip))
        g.save(sample(g, model, conds, latent, steps=1), "latent")
        latents[load] = comfyui.run(g).latents["latent"]
    # The last bits may differ: kernels round otherwise for another number of rows, as in ComfyUI's own splitting.
    assert torch.allclose(latents[local], latents[remote], atol=1e-4)


def test_the_step_cache_reuses_every_row_of_a_split_evaluation(comfyui: ComfyUI) -> None:
    g = Graph()
    model, clip, _ = remote(g, CHECKPOINT)
    settings = {"start_percent": 0.0, "end_percent": 1.0, "residual_threshold": 10.0, "max_consecutive_hits": -1}
    cached = g("LunaFirstBlockCache", model=model, enabled=True, preset="none", **settings)
    conds, latent = batch_of_33(g, encode(g, clip))
    g.save(sample(g, cached, conds, latent, steps=3), "latent")
    comfyui.run(g)
    reused = re.findall(r"Luna step cache: (\d+) of (\d+) evaluations reused", comfyui.log.read_text())[-1]
    assert reused == ("132", "198")


def test_a_failed_remote_run_leaves_nothing_that_comfyui_calls_a_leak(comfyui: ComfyUI) -> None:
    failing, fine = Graph(), Graph()
    model, clip, _ = remote(failing, CHECKPOINT)
    lora = failing(
        "LoraLoader", model=model, clip=clip, lora_name="a.safetensors", strength_model=0.5, strength_clip=0.5
    )
    tome = failing("TomePatchModel", model=lora[0], ratio=0.3)
    failing.save(sample(failing, tome, encode(failing, lora[1]), empty(failing), seed=77), "never")
    model, clip, _ = local(fine, CHECKPOINT)
    for seed in range(3):
        with pytest.raises(RunFailed, match="ToMe"):
            comfyui.run(failing)
        g = Graph(dict(fine.nodes))
        g.save(sample(g, model, encode(g, clip), empty(g), seed=seed, steps=1), "latent")
        comfyui.run(g)
    assert "memory leak with model" not in comfyui.log.read_text()
