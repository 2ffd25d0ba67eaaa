"""Gradient checkpointing for any model with repeated blocks: their activations are computed again when needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """Within the context, each block runs forward without a graph, and once more in the backward pass."""
    wrapped = []
    for path in blocks:
        module = model.get_submodule(path)
        inner = module.forward

        def forward(*args, inner=inner, **kwargs):
            return checkpoint(lambda *a: inner(*a, **kwargs), *args, use_reentrant=True)

        module.forward = forward
        wrapped.append(module)
    try:
        yield
    finally:
        for module in wrapped:
            del module.forward
