"""Our own nodes against the stock ones they stand for, in every mix of remote and local."""

import shutil
from pathlib import Path

import pytest
import torch

from serving.torchserve import TorchServe
from tests.comfyui.comfyui import ComfyUI, Graph, Output
from tests.comfyui.workflows import empty, encode, gateway, local, remote, sample

pytestmark = pytest.mark.slow

CHECKPOINT = "sd15.safetensors"


def _stock(g: Graph) -> Output:
    """What a gateway with `<lora:a:0.8:0.5>` and clip skip -2 stands for."""
    model, clip, _ = local(g, CHECKPOINT)
    lora = g("LoraLoader", model=model, clip=clip, lora_name="a.safetensors", strength_model=0.8, strength_clip=0.5)
    skipped = g("CLIPSetLastLayer", clip=lora[1], stop_at_clip_layer=-2)
    return sample(g, lora[0], encode(g, skipped, "a fox"), empty(g))


def _sampled(g: Graph, out: Output) -> Output:
    return sample(g, out[0], (out[3], out[4]), out[5], seed=out[6], steps=out[7], cfg=out[8])


@pytest.mark.parametrize("unet", (local, remote), ids=("local-unet", "remote-unet"))
@pytest.mark.parametrize("text", (local, remote), ids=("local-clip", "remote-clip"))
@pytest.mark.parametrize("timing", ("before_lora", "after_lora"))
def test_the_gateway_equals_stock_nodes_in_every_mix(unet, text, timing: str, comfyui: ComfyUI) -> None:
    g = Graph()
    g.save(_stock(g), "stock")
    model, clip, vae = unet(g, CHECKPOINT)[0], text(g, CHECKPOINT)[1], unet(g, CHECKPOINT)[2]
    out = gateway(g, model, clip, vae, "a fox <lora:a:0.8:0.5>", clip_skip=-2, clip_skip_timing=timing)
    g.save(_sampled(g, out), "gateway")
    latents = comfyui.run(g).latents
    assert torch.equal(latents["gateway"], latents["stock"])


def test_a_lora_on_the_server_equals_the_same_file_uploaded(comfyui: ComfyUI) -> None:
    g = Graph()
    parts = remote(g, CHECKPOINT)
    for name in ("on_server", "b"):
        g.save(_sampled(g, gateway(g, *parts, f"a fox <lora:{name}:0.7>")), name)
    latents = comfyui.run(g).latents
    assert torch.equal(latents["on_server"], latents["b"])


def _tagged(g: Graph) -> Output:
    return gateway(g, *remote(g, CHECKPOINT), "a fox <lora:edited:0.7>")


def _prompt_from_another_node(g: Graph) -> Output:
    return gateway(g, *remote(g, CHECKPOINT), g("PrimitiveString", value="a fox <lora:edited:0.7>"))


def _stacked(g: Graph) -> Output:
    slots = {f"lora_{slot}": "None" for slot in range(1, 6)} | {"lora_2": "edited.safetensors"}
    strengths = {f"strength{side}_{slot}": 0.7 for slot in range(1, 6) for side in ("", "_clip")}
    return gateway(g, *remote(g, CHECKPOINT), "a fox", lora_stack=g("LunaLoRAStack", **slots, **strengths))


@pytest.mark.parametrize("graph", (_tagged, _prompt_from_another_node, _stacked))
def test_a_lora_edited_on_the_server_is_noticed(graph, comfyui: ComfyUI, torchserve: TorchServe, models: Path) -> None:
    file = torchserve.store.parent / "loras" / "edited.safetensors"
    expected = Graph()
    expected.save(_sampled(expected, gateway(expected, *remote(expected, CHECKPOINT), "a fox <lora:b:0.7>")), "latent")
    g = Graph()
    g.save(_sampled(g, graph(g)), "latent")
    shutil.copyfile(models / "loras" / "a.safetensors", file)
    before = comfyui.run(g).latents["latent"]
    shutil.copyfile(models / "loras" / "b.safetensors", file)
    after = comfyui.run(g).latents["latent"]
    file.unlink()
    assert not torch.equal(after, before)
    assert torch.equal(after, comfyui.run(expected).latents["latent"])


def test_what_did_not_change_is_not_computed_again(comfyui: ComfyUI) -> None:
    g = Graph()
    g.save(_sampled(g, gateway(g, *remote(g, CHECKPOINT), "a fox <lora:on_server:0.7>")), "latent")
    comfyui.run(g)
    comfyui.run(g)  # the model is loaded from here on, which the router tells apart
    cached = dict(comfyui.run(g).history["status"]["messages"])["execution_cached"]["nodes"]
    assert len(cached) == len(g.nodes)


def test_the_step_cache_reuses_steps_and_threshold_0_none(comfyui: ComfyUI) -> None:
    g = Graph()
    model, clip, _ = remote(g, CHECKPOINT)
    switches = {"enabled": True, "start_percent": 0.0, "end_percent": 1.0, "max_consecutive_hits": -1, "preset": "none"}
    models = {
        "plain": model,
        "zero": g("LunaFirstBlockCache", model=model, residual_threshold=0.0, **switches),
        "cached": g("LunaFirstBlockCache", model=model, residual_threshold=10.0, **switches),
    }
    for name, patched in models.items():
        g.save(sample(g, patched, encode(g, clip), empty(g), steps=6), name)
    latents = comfyui.run(g).latents
    assert torch.equal(latents["zero"], latents["plain"])
    assert not torch.equal(latents["cached"], latents["plain"])
    assert "Luna step cache: 0 of " in comfyui.log.read_text()


def test_the_shared_encoders_equal_the_stock_nodes(comfyui: ComfyUI) -> None:
    g = Graph()
    model, clip, vae = local(g, CHECKPOINT)
    stock = encode(g, clip, "a fox", "blurry")
    dual = g("LunaSharedCLIPEncodeDual", clip_model=CHECKPOINT, positive="a fox", negative="blurry")
    single = g("LunaSharedCLIPEncode", clip_model=CHECKPOINT, text="a fox")
    picture = g("LoadImage", image="picture.png")[0]
    tiles = {"tiled": False, "tile_size": 256, "overlap": 64}
    latent = g("LunaSharedVAEEncode", vae_model=CHECKPOINT, pixels=picture, **tiles)
    decoded = g("LunaSharedVAEDecode", vae_model=CHECKPOINT, samples=latent, **tiles)
    g.save(g("VAEEncode", pixels=decoded, vae=vae), "shared_picture")
    stock_latent = g("VAEEncode", pixels=picture, vae=vae)
    g.save(g("VAEEncode", pixels=g("VAEDecode", samples=stock_latent, vae=vae), vae=vae), "stock_picture")
    g.save(sample(g, model, stock, stock_latent), "stock")
    g.save(sample(g, model, (dual[0], dual[1]), latent), "dual")
    g.save(sample(g, model, (single, dual[1]), latent), "single")
    latents = comfyui.run(g).latents
    assert torch.equal(latents["dual"], latents["stock"]) and torch.equal(latents["single"], latents["stock"])
    assert torch.equal(latents["shared_picture"], latents["stock_picture"])


def test_the_status_node_tells_models_and_requests(comfyui: ComfyUI) -> None:
    g = Graph()
    g("LunaServerStatus")
    told = next(iter(comfyui.run(g).history["outputs"].values()))["text"][0]
    assert "sd15.unet: cpu float32" in told and "requests" in told
