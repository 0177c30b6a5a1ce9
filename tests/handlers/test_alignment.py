"""Where a request's tensors begin when modules get them; tests/engine/test_alignment.py says why it counts."""

import torch

from luna_protocol.blob import Blob, unpack
from luna_protocol.errors import NoSharedMemory
from luna_protocol.messages import UNetForward
from luna_protocol.shared_memory import Segment, SharedBlob
from tests.handlers.test_step_cache_in_batches import SHAPE, served  # noqa: F401


def test_modules_get_aligned_inputs_however_they_come(served):  # noqa: F811
    worker, begins = served(), []
    for name, module in worker.model.role.unet.model.named_modules():
        if name in ("conv_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"):
            module.register_forward_pre_hook(lambda _, given: begins.append(given[0].data_ptr() % 64))
    for rows in (1, 2):
        # Sides such that x is no multiple of 64 bytes.
        x, context = torch.randn(rows, 4, 5, 3), torch.randn(rows, 77, SHAPE.context)
        blob = Blob(UNetForward(), {"x": x, "context": context, "timesteps": torch.full((rows,), 500.0)})
        for body in bodies(blob):
            answer = worker.engine.predict("tiny.unet", body, "test")
            assert unpack(bytearray(answer.body))[1]["out"].shape == x.shape
            assert begins == [0, 0]
            begins.clear()


def bodies(blob: Blob):
    """What a relay or a client may hand to the engine for this blob."""
    yield blob.pack()
    yield bytes(blob.pack())
    try:
        segment = Segment(blob.size)
    except NoSharedMemory:  # Linux alone has it
        return
    blob.write(segment.buffer)
    place = SharedBlob(request=segment.name, request_bytes=blob.size, reply=segment.name, reply_bytes=0)
    yield {"shared_memory": place.model_dump()}
