"""A UNet that computes nothing, so that only the way to it is measured; it stands in for the role of an archive."""

from types import SimpleNamespace

from torch import nn

from engine.lora.names import unet_targets
from engine.roles import ours
from engine.step_cache import StepCache


class UNetRole(ours.UNetRole):
    """Ours in all but the forward: SDXL's checks, joining, stacks and replies around a UNet that returns x."""

    def load(self) -> None:
        layout = SimpleNamespace(in_channels=4, context_dim=2048, adm_channels=2816)
        self.unet = SimpleNamespace(
            layout=layout, forward=_forward, control_shapes=_control_shapes, input_blocks=(), output_blocks=()
        )
        self.step_cache = StepCache(self.unet, capacity=0, ttl=1)
        self.take_loras(nn.Linear(1, 1), unet_targets({}))


def _control_shapes(height, width):
    """SDXL's."""
    levels = [(320, 1)] * 3 + [(320, 2)] + [(640, 2)] * 2 + [(640, 4)] + [(1280, 4)] * 2
    inputs = [(channels, height // scale, width // scale) for channels, scale in levels]
    return {"input": inputs, "middle": inputs[-1:], "output": inputs[::-1]}


def _forward(x, *_others):
    return x
