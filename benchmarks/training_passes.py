"""Bare passes of a model, without a loop: forward, and forward with backward; compiled and as CUDA graphs where there are any."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from training_machine import Marks, count_flops
from training_steps import Way, fresh

from amsdn.models.amsdn import AMSDN, AMSDNConfig

GRAPH = ", CUDA graph"


def passes(config: AMSDNConfig, way: Way, size: int, batch: int, repeats: int, device: torch.device, process: bool) -> dict[str, Any]:
    """Images a second of both passes by name, and operations an image; a pass that cannot be made a CUDA graph says why."""
    made = fresh(config, device)
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    model = made.to(memory_format=layout).train()  # type: ignore[call-overload]
    x = torch.rand(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    run = torch.compile(model) if way.compiled else model
    work = {"forward": lambda: _forward(run, x, way.bf16), "forward + backward": lambda: _backward(run, model, x, y, way.bf16)}
    found: dict[str, Any] = {}
    for name, once in work.items():
        found[name] = batch / _seconds(once, repeats, device, process)
        if device.type == "cuda" and not way.compiled:
            found[name + GRAPH] = _graphed(once, model, batch, repeats, device)
    return found


def pass_flops(config: AMSDNConfig, size: int, device: torch.device) -> dict[str, float]:
    """Operations for one image, by the names of ``passes``."""
    model, x, y = (
        fresh(config, device).train(),
        torch.rand(2, 3, size, size, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    return {
        "forward": count_flops(lambda: _forward(model, x, False)) / 2,
        "forward + backward": count_flops(lambda: _backward(model, model, x, y, False)) / 2,
    }


def _forward(run: Callable[[Tensor], Tensor], x: Tensor, bf16: bool) -> None:
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        run(x)


def _backward(run: Callable[[Tensor], Tensor], model: AMSDN, x: Tensor, y: Tensor, bf16: bool) -> None:
    model.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):  # a graph must not keep cached casts
        logits = run(x)
    F.cross_entropy(logits.float(), y).backward()  # type: ignore[no-untyped-call]


def _seconds(once: Callable[[], None], repeats: int, device: torch.device, process: bool) -> float:
    """The mean of ``repeats`` calls in a row after three others, as one waits in the middle of a run."""
    for _ in range(3 if device.type == "cuda" else 1):
        once()
    marks = Marks(device, process)
    marks.mark()
    for _ in range(repeats):
        once()
    marks.mark()
    return marks.seconds(0, 1) / repeats


def _graphed(once: Callable[[], None], model: AMSDN, batch: int, repeats: int, device: torch.device) -> float | str:
    """Images a second when the whole pass is one CUDA graph; or why it cannot be."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        model.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            once()
    except RuntimeError as e:
        torch.cuda.synchronize()
        return str(e).splitlines()[0]
    return batch / _seconds(graph.replay, repeats, device, False)
