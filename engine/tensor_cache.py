"""Tensors by the hash of their content, so that what a sampler repeats every step is sent once."""

from collections import OrderedDict

from torch import Tensor

from luna_protocol.blob import content_hash
from luna_protocol.errors import Malformed


class TensorCache:
    """A least-recently-used store of at most `capacity` bytes; not thread-safe, as the compute thread alone
    calls it."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.bytes = 0
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str) -> Tensor | None:
        if key in self._tensors:
            self._tensors.move_to_end(key)
        return self._tensors.get(key)

    def put(self, key: str, tensor: Tensor) -> None:
        """Keeps a copy of `tensor` under its hash.

        Raises:
            Malformed: `key` is not the hash of this tensor.
        """
        if key in self._tensors:
            return
        # Copied first: whose memory it is could still write to it.
        tensor = tensor.clone()
        actual = content_hash(tensor)
        if key != actual:
            raise Malformed(
                f"a tensor came as {key}, its content has the hash {actual}", "see content hashes in docs/protocol.md"
            )
        self._tensors[key] = tensor
        self.bytes += tensor.nbytes
        while self.bytes > self.capacity and len(self._tensors) > 1:
            _, oldest = self._tensors.popitem(last=False)
            self.bytes -= oldest.nbytes
