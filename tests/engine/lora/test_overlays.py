"""Overlays on a whole UNet: exact, transient, shared, bounded; and the side path beside them."""

import threading
from hashlib import blake2b

import pytest
import torch
from safetensors.torch import save_file

from engine.lora.files import LoraFiles
from engine.lora.merge import Scaled, merge
from engine.lora.names import unet_targets
from engine.lora.overlays import Overlays, Stack
from luna_protocol.blob import set_hash
from luna_protocol.errors import Unavailable
from luna_protocol.messages import LoraUse
from tests import checkpoints
from tests.engine.test_unet import arguments, load
from tests.loras import file_of

ALL = 1 << 40


class Bench:
    """A tiny UNet with three LoRA files: a and b plain, c a LoHa."""

    def __init__(self, unet, root, budget=ALL, files=ALL):
        targets = unet_targets(unet.names)
        shapes = {name: parameter.shape for name, parameter in unet.model.named_parameters()}
        self.unet = unet
        self.files = LoraFiles((root,), targets, shapes, files)
        self.overlays = Overlays(unet.model, self.files, budget)

    def stack(self, *names, hooks=()):
        return self.overlays.stack([use(name) for name in names], [use(name) for name in hooks])

    def forward(self, stack, inputs):
        with self.overlays.merged(stack):
            return self.unet.forward(*inputs)

    def checksum(self):
        digest = blake2b()
        for name, parameter in self.unet.model.named_parameters():
            digest.update(name.encode() + parameter.detach().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def reference(self, stack, inputs):
        """The forward of a copy whose weights were replaced by merges made one by one, with no overlay."""
        state = {name: parameter.detach().clone() for name, parameter in self.unet.model.named_parameters()}
        for uses in (stack.loras, stack.hooks):
            touched = {}
            for each in uses:
                for name, patch in self.files.get(each.source).patches.items():
                    touched.setdefault(name, []).append(Scaled(patch, each.strength, each.strength_model))
            for name, patches in touched.items():
                state[name] = merge(state[name], patches)
        # Reparametrising the module leaves everything else, hooks included, as it is.
        wrapped = _Forward(self.unet)
        return torch.func.functional_call(wrapped, {f"model.{name}": w for name, w in state.items()}, inputs)


class _Forward(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.model = unet.model
        self.run = unet.forward

    def forward(self, *inputs):
        return self.run(*inputs)


def use(spec):
    name, *strengths = spec if isinstance(spec, tuple) else (spec,)
    return LoraUse(name=name, **dict(zip(("strength_patch", "strength_model"), strengths, strict=False)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for name, seed in (("a", 2), ("b", 3)):
        checkpoints.write_lora(folder / f"{name}.safetensors", "tiny_sd15", seed=seed)
        checkpoints.write_lora(folder / f"{name}_xl.safetensors", "tiny_sdxl", seed=seed)
    layer = "lora_unet_output_blocks_2_1_transformer_blocks_0_ff_net_2"
    save_file(file_of("loha", {layer: torch.Size([64, 256])}), folder / "c.safetensors")
    return folder


@pytest.fixture
def bench(tiny, root):
    return Bench(load(tiny, "tiny_sd15"), root)


STACKS = {
    "one": (["a"], []),
    "both orders 1": ([("a", 0.8), ("b", -0.5)], []),
    "both orders 2": ([("b", -0.5), ("a", 0.8)], []),
    "negative": ([("a", -1.0)], []),
    "scaled model": ([("a", 0.5, 0.9)], []),
    "mixed formats": (["a", ("c", 0.7), "b"], []),
    "hooks only": ([], [("b", 0.6)]),
    "two stages": (["a"], [("b", 0.6), "c"]),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_gives_what_merging_its_weights_gives(tiny, root, noise, name, dtype):
    bench = Bench(load(tiny, "tiny_sd15", dtype), root)
    x, steps, context, _ = arguments(bench.unet, noise, 2, (8, 8))
    inputs = (x.to(dtype), steps, context.to(dtype))
    base, checksum = bench.unet.forward(*inputs), bench.checksum()
    loras, hooks = STACKS[name]
    stack = bench.stack(*loras, hooks=hooks)
    first, second = bench.forward(stack, inputs), bench.forward(stack, inputs)
    assert torch.equal(first, bench.reference(stack, inputs))
    assert torch.equal(first, second)
    assert not torch.equal(first, base)
    assert torch.equal(bench.unet.forward(*inputs), base)
    assert bench.checksum() == checksum


def test_two_stages_round_between_them(tiny, root, noise):
    bench = Bench(load(tiny, "tiny_sd15", torch.bfloat16), root)
    x, steps, context, _ = arguments(bench.unet, noise, 1, (8, 8))
    inputs = (x.bfloat16(), steps, context.bfloat16())
    flat = bench.forward(bench.stack("a", "b"), inputs)
    assert not torch.equal(flat, bench.forward(bench.stack("a", hooks=["b"]), inputs))


def test_order_matters_to_the_last_bits(bench, noise):
    inputs = arguments(bench.unet, noise, 1, (8, 8))[:3]
    one, other = bench.forward(bench.stack("a", "b"), inputs), bench.forward(bench.stack("b", "a"), inputs)
    assert torch.allclose(one, other, atol=1e-3)


def test_strength_zero_is_the_base_bit_for_bit(bench, noise):
    inputs = arguments(bench.unet, noise, 1, (8, 8))[:3]
    base = bench.unet.forward(*inputs)
    assert torch.equal(bench.forward(bench.stack(("a", 0.0)), inputs), base)
    assert torch.equal(bench.forward(bench.stack(("a", 0.0), hooks=[("b", 0.0)]), inputs), base)
    assert torch.equal(bench.forward(bench.stack(), inputs), base)
    assert bench.overlays.counters.nbytes == 0
    half = bench.forward(bench.stack(("a", 0.5)), inputs)
    full = bench.forward(bench.stack("a"), inputs)
    assert 0 < (half - base).norm() < (full - base).norm()


def test_sdxl_stacks_are_exact_too(tiny, root, noise):
    bench = Bench(load(tiny, "tiny_sdxl"), root)
    inputs = arguments(bench.unet, noise, 1, (8, 8))
    stack = bench.stack("a_xl", ("b_xl", -0.5))
    assert torch.equal(bench.forward(stack, inputs), bench.reference(stack, inputs))


def test_an_overlay_touches_only_what_the_lora_patches(bench):
    with bench.overlays.merged(bench.stack("c")) as (match,):
        assert match.patched == 1
        changed = [
            name
            for name, parameter in bench.unet.model.named_parameters()
            if parameter is not bench.overlays._base[name]
        ]
    assert changed == ["up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight"]
    assert all(p is bench.overlays._base[name] for name, p in bench.unet.model.named_parameters())


def test_an_exception_inside_the_forward_leaves_the_base(bench, noise):
    inputs = arguments(bench.unet, noise, 1, (8, 8))[:3]
    base, checksum = bench.unet.forward(*inputs), bench.checksum()
    for manager in (bench.overlays.merged(bench.stack("a")), bench.overlays.unmerged([(bench.stack("a"), 1)])):
        with pytest.raises(ZeroDivisionError), manager:
            raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        bench.forward(bench.stack("a"), (inputs[0], inputs[1], inputs[2][..., :7]))
    assert bench.checksum() == checksum
    assert torch.equal(bench.unet.forward(*inputs), base)


def test_an_exception_inside_the_merge_keeps_nothing(bench, noise, monkeypatch):
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise MemoryError
        return merge(*arguments)

    monkeypatch.setattr("engine.lora.overlays.merge", failing)
    checksum = bench.checksum()
    with pytest.raises(MemoryError), bench.overlays.merged(bench.stack("a")):
        pass
    assert bench.overlays.counters.nbytes == 0
    assert bench.checksum() == checksum
    inputs = arguments(bench.unet, noise, 1, (8, 8))[:3]
    stack = bench.stack("a")
    assert torch.equal(bench.forward(stack, inputs), bench.reference(stack, inputs))


def test_merged_once_and_then_only_exchanged(bench, noise):
    inputs = arguments(bench.unet, noise, 1, (8, 8))[:3]
    a, b = bench.stack("a"), bench.stack("b")
    for _ in range(5):
        bench.forward(a, inputs)
        bench.forward(b, inputs)
    counters = bench.overlays.counters
    assert (counters.merges, counters.hits, counters.evictions) == (2, 8, 0)
    assert counters.nbytes == sum(
        bench.overlays._base[name].nbytes for s in (a, b) for name in bench.files.get(s.loras[0].source).patches
    )
    assert counters.merge_seconds > 0


def test_beyond_the_budget_the_least_recently_used_goes(tiny, root, noise):
    bench = Bench(load(tiny, "tiny_sd15"), root)
    inputs = arguments(bench.unet, noise, 1, (8, 8))[:3]
    stacks = [bench.stack(("a", strength)) for strength in (0.1, 0.2, 0.3)]
    with bench.overlays.merged(stacks[0]):
        size = bench.overlays.counters.nbytes
    bench = Bench(bench.unet, root, budget=2 * size)
    for stack in (stacks[0], stacks[1], stacks[0], stacks[2], stacks[0]):
        bench.forward(stack, inputs)
    counters = bench.overlays.counters
    assert (counters.merges, counters.hits, counters.evictions, counters.nbytes) == (3, 2, 1, 2 * size)
    assert bench.overlays.fit(stacks[:2])
    assert not bench.overlays.fit(stacks)


def test_a_changed_file_makes_a_new_overlay(tiny, tmp_path, noise):
    bench = Bench(load(tiny, "tiny_sd15"), tmp_path)
    inputs = arguments(bench.unet, noise, 1, (8, 8))[:3]
    outs = []
    for seed in (2, 3):
        checkpoints.write_lora(tmp_path / "x.safetensors", "tiny_sd15", seed=seed)
        stack = bench.stack("x")
        outs.append(bench.forward(stack, inputs))
        assert torch.equal(outs[-1], bench.reference(stack, inputs))
    assert not torch.equal(*outs)


def test_uploads_are_asked_for_until_they_are_merged(tiny, root, noise):
    unet = load(tiny, "tiny_sd15")
    bench = Bench(unet, root, files=0)
    layer = {"diffusion_model.middle_block.1.proj_in": torch.Size([64, 64, 1, 1])}
    tensors = file_of("lora", layer)
    content = set_hash(tensors)
    stack = bench.overlays.stack([LoraUse(content=content, strength_patch=0.5)])
    assert bench.overlays.missing(stack) == [content]
    with pytest.raises(Unavailable), bench.overlays.merged(stack):
        pass
    bench.overlays.receive(content, tensors)
    assert bench.overlays.missing(stack) == []
    inputs = arguments(unet, noise, 1, (8, 8))[:3]
    expected = bench.reference(stack, inputs)
    assert torch.equal(bench.forward(stack, inputs), expected)
    # The patches are gone (the cache holds nothing), the overlay is not.
    assert bench.overlays.missing(stack) == []
    assert torch.equal(bench.forward(stack, inputs), expected)
    assert bench.overlays.missing(bench.overlays.stack([LoraUse(content=content)])) == [content]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("shape", "suffix"), [("tiny_sd15", ""), ("tiny_sdxl", "_xl")])
def test_beside_the_weights_each_row_gets_its_own_stack(tiny, root, noise, shape, suffix, dtype, bound):
    bench = Bench(load(tiny, shape, dtype), root)
    inputs = arguments(bench.unet, noise, 4, (8, 8))
    inputs = [None if t is None else t if i == 1 else t.to(dtype) for i, t in enumerate(inputs)]
    rows = [
        (bench.stack(f"a{suffix}", (f"b{suffix}", -0.5)), 1),
        (bench.stack(), 2),
        (bench.stack((f"b{suffix}", 0.7)), 1),
    ]
    assert all(bench.overlays.mergeless(stack) for stack, _ in rows)
    base = bench.unet.forward(*inputs)
    with bench.overlays.unmerged(rows) as matches:
        together = bench.unet.forward(*inputs)
    assert [len(each) for each in matches] == [2, 0, 1]
    assert torch.equal(bench.unet.forward(*inputs), base)
    start = 0
    for stack, count in rows:
        own = [None if t is None else t[start : start + count] for t in inputs]
        expected = bench.forward(stack, own)
        deviation = (together[start : start + count] - expected).norm() / expected.norm()
        assert deviation < bound
        if stack.uses:
            assert (expected - base[start : start + count]).norm() / expected.norm() > 5 * bound
        start += count
    assert bench.overlays.counters.unmerged_forwards == 1


def test_only_plain_loras_run_beside_the_weights(bench):
    assert bench.overlays.mergeless(bench.stack("a", ("b", -2.0)))
    assert not bench.overlays.mergeless(bench.stack("a", "c"))
    assert not bench.overlays.mergeless(bench.stack(("a", 1.0, 0.9)))
    assert not bench.overlays.mergeless(bench.stack("a", hooks=["b"]))


@pytest.mark.slow
def test_a_thousand_forwards_from_eight_threads_see_only_their_own_stack(tiny, root, noise):
    unet = load(tiny, "tiny_sd15")
    inputs = arguments(unet, noise, 1, (8, 8))[:3]
    specs = [[], ["a"], ["b"], [("a", 0.5), "b"], ["b", ("a", -0.5)], ["c"], [("a", 0.0)]]
    alone = Bench(unet, root)
    expected = [alone.forward(alone.stack(*spec), inputs) for spec in specs]
    bench = Bench(unet, root, budget=3 * alone.overlays.counters.nbytes // 5)
    checksum = bench.checksum()
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            for _ in range(125):
                which = int(torch.randint(len(specs), (), generator=generator))
                if not torch.equal(bench.forward(bench.stack(*specs[which]), inputs), expected[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert bench.overlays.counters.evictions > 0
    assert bench.checksum() == checksum
    assert torch.equal(bench.unet.forward(*inputs), expected[0])


def test_stacks_are_equal_however_a_file_is_called(bench):
    assert bench.stack("a") == bench.stack("a.safetensors") != bench.stack(("a", 0.5))
    assert bench.stack() == Stack()


def test_without_a_budget_overlays_take_no_more_than_some_times_the_model(bench, monkeypatch):
    monkeypatch.setattr("engine.lora.overlays._free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr("engine.lora.overlays.STACKS", 1)
    overlays = bench.overlays
    overlays._fixed_budget = None
    weights = sum(weight.nbytes for weight in bench.unet.model.parameters())
    for strength in (0.1, 0.2, 0.3, 0.4):
        with overlays.merged(overlays.stack([LoraUse(name="a", strength_patch=strength)])):
            assert 0 < overlays.counters.nbytes <= weights
    assert overlays.counters.evictions
