"""What of a step would make a GPU wait, seen on a CPU: calls whose answer the host must have, and values that the host uploads."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ANSWERS = {  # their result, or its size, is needed on the host
    aten._local_scalar_dense,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,  # by a tensor of counts; by a number it is no such call
    aten.bincount,
}
# Which attack, which size: draws by a generator of the host, whose numbers never were on the device.
ON_THE_HOST = {"attack_mix.draw", "attack_ranges._index"}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def _caller() -> str:
    """The function of the package, or of a test, that made the call, as module.function."""
    frame = sys._getframe(2)
    while frame.f_back is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


class _Answers(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if packet in ANSWERS and not (packet is aten.repeat_interleave and func is aten.repeat_interleave.self_int):
            self._note(str(packet))
        elif by_mask:
            self._note(f"{packet} by a mask")
        return func(*args, **(kwargs or {}))

    def _note(self, what: str) -> None:
        if (caller := _caller()) not in ON_THE_HOST:
            self.found.append(f"{what} in {caller}")


class _Uploads(TorchFunctionMode):
    """Tensors made of the host's numbers where a device is named: on a CPU nothing else tells them from those that stay on the host."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None and not isinstance(args[0], torch.Tensor)
        if made or func is torch.Tensor.new_tensor:
            self.found.append(f"{func.__name__} of {args[-1]!r} in {_caller()}")
        return func(*args, **kwargs)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Within, the calls that would wait for a GPU are noted in the list."""
    found: list[str] = []
    with _Uploads(found), _Answers(found):
        yield found
