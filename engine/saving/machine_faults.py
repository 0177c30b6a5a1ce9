"""Whose fault a failed try of a job is: the machine's, then the job waits for as long as it takes; or the job's own."""

import errno
import re

import torch
from sqlalchemy.exc import DBAPIError

from luna_protocol.errors import Internal, OutOfMemory, Unavailable

# A path that no file system of this kind could take; on any other OSError the disk, the share or its rights are at
# fault. Pillow's own OSErrors carry no number: they are about the picture.
_IMPOSSIBLE_PATHS = (
    *(errno.EEXIST, errno.EILSEQ, errno.EINVAL, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, None),
)
# torch has no types for what these libraries and its own allocator of host memory report.
_DEVICE = re.compile(
    r"CUDA (error|driver)|CUDNN_STATUS|cuDNN error|CUBLAS_STATUS|HIP error|MPS backend|DefaultCPUAllocator"
)


def is_of_the_machine(error: Exception) -> bool:
    """Whether the same job may succeed once somebody has seen to the disk, the database, the memory or the device."""
    match error:
        case OSError():
            return error.errno not in _IMPOSSIBLE_PATHS
        case DBAPIError() | MemoryError() | torch.OutOfMemoryError() | torch.AcceleratorError():
            return True
        case OutOfMemory() | Unavailable():
            return True
        case RuntimeError() | Internal():
            return bool(_DEVICE.search(str(error)))
    return False
