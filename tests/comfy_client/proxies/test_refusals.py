import pytest

from comfy_client.proxies.refusals import NotRemote, node_of, refuse_block_patches


class SelfAttentionGuidance:
    def patch(self):
        def attn_and_record(q, k, v, extra_options): ...

        return attn_and_record


class CrossAttentionPatch:
    def __call__(self, q, k, v, extra_options): ...


CrossAttentionPatch.__module__ = "/opt/ComfyUI/custom_nodes.ComfyUI_IPAdapter_plus.CrossAttentionPatch"


def test_plain_steps_pass():
    refuse_block_patches(
        {
            "cond_or_uncond": [0, 1],
            "sigmas": object(),
            "prefetch_dynamic_vbars": False,
            "wrappers": {"diffusion_model": {None: [print]}},
            "callbacks": {},
            "patches": {},
            "patches_replace": {"attn1": {}},
            "a scalar of some later version": 3,
        }
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"patches_replace": {"attn1": {("middle", 0): SelfAttentionGuidance().patch()}}},
            r"Self-Attention Guidance \(SAG\) replaces parts of the UNet's blocks \(attn1\)",
        ),
        (
            {"patches_replace": {"attn2": {("output", 3): CrossAttentionPatch()}}},
            r"CrossAttentionPatch of ComfyUI_IPAdapter_plus replaces parts of the UNet's blocks \(attn2\)",
        ),
        (
            {"patches": {"middle_patch": [SelfAttentionGuidance().patch()]}},
            r"SAG\) patches the UNet's blocks \(middle_patch\)",
        ),
        ({"optimized_attention_override": len}, r"len changes how the UNet's blocks compute"),
    ],
)
def test_what_runs_inside_the_blocks_is_refused_by_name(options, told):
    with pytest.raises(NotRemote, match=told):
        refuse_block_patches(options)


def test_nodes_are_known_by_their_outermost_name():
    assert node_of(SelfAttentionGuidance().patch()) == "Self-Attention Guidance (SAG)"
