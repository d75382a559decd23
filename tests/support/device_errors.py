"""Errors as a device and torch raise them, and whether they mean that the GPU has failed."""

from __future__ import annotations

from sdbento.errors import InvalidParameter, OutOfMemory

FATAL_SEED = 666  # the request at which the GPU of `faulty_gpu` fails
HANGING_SEED = 777  # the request at which it hangs


class AcceleratorError(RuntimeError):
    """A stand-in for torch.AcceleratorError, which cannot be raised without a device."""


SICK: list[tuple[Exception, bool]] = [
    (AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
    (AcceleratorError("CUDA error: out of memory"), False),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `x`"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), False),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
    (OutOfMemory("the device ran out of memory"), False),
    (InvalidParameter("width is bad"), False),
    (ValueError("a bug"), False),
]
