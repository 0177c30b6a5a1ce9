"""torch.compile for a UNet's blocks.

Block by block, so that step caches and ControlNet residuals still enter between them, and blocks of one shape share one
compiled function: weights are arguments of it, so an overlay's are taken as they come. Sizes are variables of it, but
for those that are 1.
"""

import logging
from collections.abc import Callable

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import nn

from engine.diffusers_modules import BasicTransformerBlock, ResnetBlock2D

log = logging.getLogger(__name__)

_VARIANTS = 256  # of one forward: by channels, by one row or more, with and without what is optional


def compile_blocks(model: nn.Module, forward: Callable[[], object]) -> None:
    """Has the blocks of `model` compiled, by running `forward` on it.

    Where that fails, for want of a C++ compiler or Triton perhaps, a line of log tells why, and nothing is compiled in
    this process. Hooks that are registered later on a compiled block's layers are not run.
    """
    # Or sizes that happen to be equal here, such as a picture's sides, would have to be equal in every request.
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _VARIANTS
    for module in model.modules():
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
            module.compile(dynamic=True)
    try:
        forward()
    except Exception as error:
        log.warning("the UNet runs uncompiled, as torch.compile fails here: %s", error)
        torch.compiler.set_stance("force_eager")
    # A variant that a later request needs and that cannot be compiled runs uncompiled too.
    torch._dynamo.config.suppress_errors = True
