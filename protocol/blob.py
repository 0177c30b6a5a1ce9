"""A message and its tensors as one safetensors blob, and tensors named by their content.

The message travels as JSON in the blob's metadata under the key `luna`. A tensor whose strides are channels-last is
named in `channels_last` there: kernels choose their arithmetic by strides, so dropping them changes the last bits.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load, save

from protocol.errors import Malformed

METADATA_KEY = "luna"
MAX_HEADER_BYTES = 4 << 20


def pack(message: BaseModel, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Serialises `message` and `tensors` (any device, any strides; sent as they lie, row by row) to one blob."""
    strided = [name for name, tensor in tensors.items() if _is_channels_last(tensor)]
    header = {"message": message.model_dump(mode="json"), "channels_last": strided}
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(flat, metadata={METADATA_KEY: json.dumps(header)})


def unpack(blob: bytes | bytearray | memoryview) -> tuple[dict, dict[str, torch.Tensor]]:
    """The message as plain JSON and the tensors of a blob that `pack` (or any safetensors writer) made.

    Raises:
        Malformed: when the blob is not safetensors, or carries no message.
    """
    blob = bytes(blob)
    message, strided = _header(blob)
    try:
        tensors = load(blob)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise Malformed(
            f"the blob is not safetensors: {error}", "send one safetensors blob, see docs/protocol.md"
        ) from error
    for name in strided:
        if name in tensors and tensors[name].ndim == 4:
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    return message, tensors


def content_hash(tensor: torch.Tensor) -> str:
    """A name for a tensor's dtype, shape and bytes: 32 hexadecimal digits (BLAKE2b, 128 bits)."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def set_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """A name for a set of named tensors, whatever their order: 32 hexadecimal digits (BLAKE2b, 128 bits)."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}\0{content_hash(tensors[name])}\n".encode())
    return digest.hexdigest()


def _header(blob: bytes) -> tuple[dict, list[str]]:
    size = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or size > min(len(blob) - 8, MAX_HEADER_BYTES):
        raise Malformed(
            f"the blob ends before its header does: {len(blob)} bytes",
            "send one safetensors blob, see docs/protocol.md",
        )
    try:
        header = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"][METADATA_KEY])
        message, strided = header["message"], header.get("channels_last", [])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Malformed(
            f"the blob carries no message: {error!r}",
            f"put the request's JSON into its metadata under '{METADATA_KEY}'",
        ) from error
    if not isinstance(message, dict) or not isinstance(strided, list):
        raise Malformed("the blob's message is not an object", 'send {"message": {...}, "channels_last": []}')
    return message, [name for name in strided if isinstance(name, str)]


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
