"""What a machine can do, and what is asked of it: matrix peak, floating point operations, and marks in time."""

import time
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # of the square matrices whose product shows the peak


def matmul_peak(device: torch.device, dtype: torch.dtype, repeats: int = 6) -> float:
    """The most operations a second that a product of two square matrices reaches.

    The best over sizes and repeats, not the mean: a peak is what the machine can do when nothing disturbs it.
    """
    best = 0.0
    for side in SIDES["cuda" if device.type == "cuda" else "cpu"]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * side**3 / _fastest(lambda a=a, b=b: a @ b, device, repeats))  # type: ignore[misc]
    return best


def convolution_peak(device: torch.device, dtype: torch.dtype, repeats: int = 6) -> float:
    """The most operations a second that a dense 3x3 convolution of 256 channels reaches, channels last.

    A library may be better at these than at matrix products: here, in fp32, MKL's products reach 94 GFLOP/s on one core of an AMD
    EPYC and oneDNN's convolutions 235. On CUDA torch allows TF32 in fp32 convolutions, and not in products, unless told otherwise.
    """
    batch, channels, side = (64, 256, 32) if device.type == "cuda" else (16, 256, 8)
    x = torch.randn(batch, channels, side, side, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return 2 * batch * side**2 * channels**2 * 9 / _fastest(lambda: F.conv2d(x, w, padding=1), device, repeats)


def _fastest(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the quickest of ``repeats`` calls, after one to warm up."""
    work()
    marks = Marks(device, process=device.type == "cpu" and torch.get_num_threads() == 1)
    marks.mark()
    for _ in range(repeats):
        work()
        marks.mark()
    return min(marks.seconds(i, i + 1) for i in range(repeats))


class Marks:
    """Moments of the work on a device, and the seconds between them; marking does not make the host wait for the device.

    With ``process=True`` (a CPU, one thread, no workers) the seconds are those that this process has worked, so that others on
    the machine do not count; they are the wall clock's where nothing else runs.
    """

    def __init__(self, device: torch.device, process: bool = False) -> None:
        self.cuda = device.type == "cuda"
        assert not (self.cuda and process), "an accelerator's work is not in the process's own seconds"
        self._now = time.process_time if process else time.perf_counter
        self._marks: list[Any] = []

    def __len__(self) -> int:
        return len(self._marks)

    def mark(self) -> None:
        """Note this moment, on CUDA that of the device's queue."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(self._now())

    def seconds(self, first: int, last: int) -> float:
        """From mark ``first`` to mark ``last``; waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
            return float(self._marks[first].elapsed_time(self._marks[last])) / 1e3
        return float(self._marks[last] - self._marks[first])


def count_flops(work: Callable[[], object]) -> int:
    """The floating point operations (a multiplication and an addition are two) of all matrix products and convolutions in ``work``.

    Element-wise work is not counted, as in every published figure of this kind. The formulas are those of
    ``torch.utils.flop_counter``; its ``FlopCounterMode`` itself cannot be used, because it also follows modules by hooks that
    fail inside ``torch.autograd.grad``, which is how an attack takes its gradients (torch 2.15).
    """
    with _Counter() as counter:
        work()
    return counter.total


def count_operators(work: Callable[[], object]) -> int:
    """How many operators torch dispatches in ``work``: about as many kernels as a GPU would be asked for, views not counted."""
    with _Counter() as counter:
        work()
    return counter.operators


class _Counter(TorchDispatchMode):
    """Adds up what every operator costs by its shapes, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += not func.is_view
        if func is torch.ops.aten.convolution_backward.default:
            self.total += _convolution_backward(*args)
        elif func._overloadpacket in flop_registry:
            self.total += int(flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out))
        return out


def _convolution_backward(grad_out: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """Each of the two gradients that are wanted costs what the forward pass did: a term for every (output cell, tap) pair.

    torch's own formula is too large for the weight gradient by the number of groups (9 instead of 2 forward passes for 8 groups).
    """
    *_, transposed, _, _, wanted = rest
    cells = x if transposed else grad_out
    return int(sum(wanted[:2])) * 2 * len(x) * prod(cells.shape[2:]) * weight.numel()


def median(values: list[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def spread(values: list[float]) -> dict[str, Any]:
    """The median of the values, with the least, the greatest and their number."""
    return {"n": len(values), "median": median(values), "low": min(values), "high": max(values)}


def random_images(count: int, size: int, generator: torch.Generator) -> Tensor:
    """uint8 noise [count,3,size,size] on the CPU: what a step costs does not depend on what is in the pictures."""
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
