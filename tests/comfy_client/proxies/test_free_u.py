"""Patches made as ComfyUI's FreeU nodes make them; tests/comfyui has the real ones."""

from comfy_client.proxies.free_u import take_free_u
from luna_protocol.messages import FreeU


class FreeU_V2:
    def patch(self, channels, b1, b2, s1, s2):
        scale_dict = {channels * 4: (b1, s1), channels * 2: (b2, s2)}

        def output_block_patch(h, hsp, transformer_options):
            return h, hsp * scale_dict[1]

        output_block_patch.__module__ = "/opt/ComfyUI/comfy_extras/nodes_freelunch_x_py"
        return output_block_patch


def options(*patches):
    return {"patches": {"output_block_patch": list(patches), "attn1_patch": [print]}, "sigmas": 3}


def test_free_u_becomes_numbers_and_other_patches_stay():
    one, other = FreeU_V2().patch(320, 1.1, 1.2, 0.9, 0.2), FreeU_V2().patch(320, 2, 2, 0, 0)
    found, left = take_free_u(options(one, other), 320)
    assert found == (
        FreeU(version=2, b1=1.1, b2=1.2, s1=0.9, s2=0.2),
        FreeU(version=2, b1=2, b2=2, s1=0, s2=0),
    )
    assert left == {"patches": {"attn1_patch": [print]}, "sigmas": 3}


def test_what_is_not_quite_that_is_left_to_be_refused():
    genuine, foreign = FreeU_V2().patch(320, 1.1, 1.2, 0.9, 0.2), FreeU_V2().patch(320, 1.1, 1.2, 0.9, 0.2)
    foreign.__module__ = "/opt/ComfyUI/custom_nodes.free_u_advanced"
    for patches in ((foreign,), (genuine, foreign), (FreeU_V2().patch(64, 1, 1, 1, 1),), ()):
        assert take_free_u(options(*patches), 320) == ((), options(*patches))
