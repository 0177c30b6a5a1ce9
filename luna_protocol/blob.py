"""A message and its tensors as one safetensors blob, and tensors named by their content.

The message travels as JSON in the blob's metadata under the key `luna`. A tensor whose strides are channels-last is
named in `channels_last` there: kernels choose their arithmetic by strides, so dropping them changes the last bits. A
message too large for a header is a uint8 tensor of JSON, and `message` is that tensor's name.

Written and read here rather than by the safetensors library, which puts a blob together in memory of its own: a tensor
is copied once on its way out, straight to where the blob is wanted, and on its way in only where it is not aligned.
"""

import hashlib
import json
import math
from collections.abc import Mapping

import torch
from pydantic import BaseModel
from torch import Tensor

from luna_protocol.alignment import ALIGNMENT, aligned
from luna_protocol.errors import Malformed, TooLarge

METADATA_KEY = "luna"
_MESSAGE = "luna.message"
MAX_HEADER_BYTES = 4 << 20
MAX_MESSAGE_BYTES = 32 << 20
_MAX_INLINE_BYTES = 1 << 20  # in a header every quotation mark takes another byte
_MAX_ELEMENTS = 1 << 48
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Blob:
    """A blob about to be written: its size is known, and its tensors are copied once, by `write`.

    Args:
        message: any message; it becomes JSON.
        tensors: any device and strides, of a dtype that safetensors names; sent row by row.

    Raises:
        Malformed: a tensor of another dtype.
        TooLarge: more JSON than a reader accepts.
    """

    def __init__(self, message: BaseModel, tensors: Mapping[str, Tensor]):
        strided = [name for name, tensor in tensors.items() if _is_channels_last(tensor)]
        told = {"message": message.model_dump(mode="json"), "channels_last": strided}
        text = json.dumps(told)
        if len(text) > _MAX_INLINE_BYTES:
            content = json.dumps(told["message"]).encode()
            if len(content) > MAX_MESSAGE_BYTES:
                raise TooLarge(
                    f"the message is {len(content)} bytes of JSON", f"at most {MAX_MESSAGE_BYTES} can be sent"
                )
            tensors = {**tensors, _MESSAGE: torch.frombuffer(bytearray(content), dtype=torch.uint8)}
            text = json.dumps(told | {"message": _MESSAGE})
        header: dict[str, dict] = {"__metadata__": {METADATA_KEY: text}}
        # By falling power of two in their sizes: then each begins at a multiple of its own, without the gaps that
        # safetensors forbids.
        self._tensors = sorted(tensors.items(), key=lambda item: -(item[1].nbytes & -item[1].nbytes))
        end = 0
        for name, tensor in self._tensors:
            if tensor.dtype not in _DTYPE_NAMES:
                raise Malformed(f"{name} is {str(tensor.dtype)[6:]}", f"what can be sent: {', '.join(_DTYPES)}")
            begin, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        if len(text) > MAX_HEADER_BYTES - ALIGNMENT:
            raise TooLarge(
                f"{len(tensors)} tensors make {len(text)} bytes of header", f"at most {MAX_HEADER_BYTES} can be sent"
            )
        self._header = text + b" " * (-(8 + len(text)) % ALIGNMENT)
        self.size = 8 + len(self._header) + end

    def write(self, target: memoryview) -> None:
        """Writes the blob to the first `size` bytes of `target`, which is flat, of bytes and writable."""
        start = 8 + len(self._header)
        target[:8] = len(self._header).to_bytes(8, "little")
        target[8:start] = self._header
        devices = set()
        for _, tensor in self._tensors:
            end = start + tensor.nbytes
            if tensor.is_cuda and tensor.nbytes:
                torch.frombuffer(target[start:end], dtype=torch.uint8).copy_(_flat(tensor), non_blocking=True)
                devices.add(tensor.device)
            else:
                # Not Tensor.copy_, whose threads spin longer than such a copy takes.
                target[start:end] = _bytes(tensor)
            start = end
        for device in devices:
            torch.cuda.current_stream(device).synchronize()

    def pack(self) -> bytearray:
        """The blob in memory of its own."""
        packed = bytearray(self.size)
        with memoryview(packed) as target:
            self.write(target)
        return packed


def pack(message: BaseModel, tensors: Mapping[str, Tensor]) -> bytearray:
    """`message` and `tensors` as one blob."""
    return Blob(message, tensors).pack()


def unpack(blob: bytes | bytearray | memoryview) -> tuple[dict, dict[str, Tensor]]:
    """The message as plain JSON and the tensors of a blob that `pack` (or any safetensors writer) made.

    Every tensor is `aligned`. Those that lie so in `blob` are views of it: what is to outlive its memory's next use has
    to be cloned. Of memory that cannot be written, which torch has no tensors for, they are views of a copy.

    Raises:
        Malformed: when the blob is not safetensors, or carries no message.
    """
    view = memoryview(blob).cast("B")
    if view.readonly:
        copy = memoryview(torch.empty(len(view), dtype=torch.uint8).numpy())
        copy[:] = view
        view = copy
    header, data = _header(view)
    message, strided = _told(header)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(*item)):
        tensors[name], end = _tensor(name, entry, data, end)
    if end != len(data):
        raise _not_safetensors(f"its tensors end at {end}, its data at {len(data)}")
    for name in strided:
        if name in tensors and tensors[name].ndim == 4:
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    if isinstance(message, str):
        message = _message_of(tensors.pop(message, None))
    return message, tensors


def content_hash(tensor: Tensor) -> str:
    """A name for a tensor's dtype, shape and bytes: 32 hexadecimal digits (BLAKE2b, 128 bits)."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def set_hash(tensors: Mapping[str, Tensor]) -> str:
    """A name for a set of named tensors, whatever their order: 32 hexadecimal digits (BLAKE2b, 128 bits)."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}\0{content_hash(tensors[name])}\n".encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row by row; without a copy where it lies so in the CPU's memory."""
    return memoryview(_flat(tensor.cpu()).numpy())


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's bytes, row by row, where it is; without a copy where it lies so."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _header(view: memoryview) -> tuple[dict, memoryview]:
    size = int.from_bytes(view[:8], "little")
    if len(view) < 8 or size > min(len(view) - 8, MAX_HEADER_BYTES):
        raise Malformed(
            f"the blob ends before its header does: {len(view)} bytes",
            "send one safetensors blob, see docs/protocol.md",
        )
    try:
        header = json.loads(bytes(view[8 : 8 + size]))
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _not_safetensors("its header is not an object")
    return header, view[8 + size :]


def _told(header: dict) -> tuple[dict | str, list[str]]:
    """The message, or the name of the tensor that holds it, and the names of channels-last tensors; takes the metadata
    out of `header`."""
    try:
        told = json.loads(header.pop("__metadata__")[METADATA_KEY])
        message, strided = told["message"], told.get("channels_last", [])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_message(error) from error
    if not isinstance(message, dict | str) or not isinstance(strided, list):
        raise Malformed("the blob's message is not an object", 'send {"message": {...}, "channels_last": []}')
    return message, [name for name in strided if isinstance(name, str)]


def _message_of(tensor: Tensor | None) -> dict:
    if tensor is None or tensor.dtype != torch.uint8 or tensor.numel() > MAX_MESSAGE_BYTES:
        raise Malformed(
            "the blob's message is in no tensor of it", f"send it as uint8, at most {MAX_MESSAGE_BYTES} bytes"
        )
    try:
        message = json.loads(bytes(_bytes(tensor)))
    except (ValueError, RecursionError) as error:
        raise _no_message(error) from error
    if not isinstance(message, dict):
        raise Malformed("the blob's message is not an object", 'send {"kind": ...} in the tensor that has it')
    return message


def _no_message(error: Exception) -> Malformed:
    return Malformed(
        f"the blob carries no message: {error!r}",
        f"put the request's JSON into its metadata under '{METADATA_KEY}'",
    )


def _begin(name: str, entry: object) -> tuple[int, int]:
    """Where a tensor begins and ends; an empty one comes before what begins at the same place."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(o) is not int or o < 0 for o in offsets):
        raise _not_safetensors(f"the offsets of {name!r} are {str(offsets)[:80]}")
    return offsets[0], offsets[1]


def _tensor(name: str, entry: dict, data: memoryview, follows: int) -> tuple[Tensor, int]:
    """The tensor of one entry, which has to begin where the one before it ended, and its own end."""
    (begin, end), shape, dtype = entry["data_offsets"], entry.get("shape"), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _not_safetensors(f"{name!r} has the dtype {str(dtype)[:80]!r}; known are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > 16 or any(type(side) is not int or side < 0 for side in shape):
        raise _not_safetensors(f"{name!r} has the shape {str(shape)[:80]}")
    if math.prod(max(side, 1) for side in shape) > _MAX_ELEMENTS:  # which an empty tensor's sides can reach too
        raise _not_safetensors(f"{name!r} has the shape {str(shape)[:80]}, more than {_MAX_ELEMENTS} elements")
    if begin != follows or not begin <= end <= len(data):
        raise _not_safetensors(f"{name!r} lies at {begin} to {end}; {follows} to at most {len(data)} is possible")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != size:
        raise _not_safetensors(f"{name!r} has {end - begin} bytes, its shape and dtype make {size}")
    if size == 0:
        return torch.empty(shape, dtype=_DTYPES[dtype]), end
    flat = aligned(torch.frombuffer(data[begin:end], dtype=torch.uint8))
    return flat.view(_DTYPES[dtype]).view(shape), end


def _not_safetensors(reason: str) -> Malformed:
    return Malformed(f"the blob is not safetensors: {reason}", "send one safetensors blob, see docs/protocol.md")


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
