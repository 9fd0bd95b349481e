"""When memory runs out in the middle of a step, the step is taken back and computed again in smaller parts."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

# What torch's CPU allocator and the CUDA libraries say, where they raise a plain RuntimeError.
TELLS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's or the host's memory is exhausted, whoever raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(tell in str(error) for tell in TELLS)


def unless_out_of_memory(compute: Callable[[], T]) -> T | None:
    """What ``compute`` returns, or None if memory ran out; then all that it held is free again. Other errors pass through."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Only here, outside the handler, are the traceback and with it the step's graph gone.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
