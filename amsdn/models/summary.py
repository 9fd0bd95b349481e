"""Printing a module's shapes and sizes, shared by every ``python -m amsdn.models...``."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn


def parameter_count(module: nn.Module) -> int:
    """The number of trainable and frozen parameter values, buffers excluded."""
    return sum(p.numel() for p in module.parameters())


def print_stage(module: nn.Module, tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
    """Print one line for each named tensor or list of tensors, then one for each child of ``module``."""
    print(type(module).__name__)
    for name, value in tensors.items():
        shapes = [list(t.shape) for t in ([value] if isinstance(value, Tensor) else value)]
        print(f"  {name:<24} {'  '.join(map(str, shapes))}")
    for name, child in module.named_children():
        print(f"  {name:<24} {parameter_count(child):>12,} parameters")
    print(f"  {'total':<24} {parameter_count(module):>12,} parameters")
