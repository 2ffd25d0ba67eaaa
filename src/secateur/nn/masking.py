"""The reference that slicing must equal: units silenced in place, nothing removed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from secateur.nn.params import get_tensor
from secateur.nn.slicing import slice_tensors_


@torch.no_grad()
def silence_(root: nn.Module, name: str, axis: int, gone: Tensor) -> None:
    """Zero the entries of a weight along an axis where `gone` (bool, [n]) is set."""
    get_tensor(root, name).index_fill_(axis, gone.nonzero()[:, 0], 0)


def restrict_norm_(norm: nn.Module, alive: Tensor) -> None:
    """Make a norm over a hidden dimension compute its statistics from the units that stay.

    A LayerNorm between producer and consumer couples the units, so silencing a consumer column is not the same as
    removing the unit; with the statistics restricted likewise it is.

    Args:
        norm: a module from [..., n] to [..., n] whose parameters are [n].
        alive: bool, [n].
    """
    small = copy.deepcopy(norm)
    slice_tensors_(small, {n: {0: alive} for n, p in small.named_parameters() if p.shape == alive.shape})
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (int(alive.sum()),)  # type: ignore[assignment]

    def forward(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[..., alive] = small(x[..., alive])
        return out

    norm.forward = forward
