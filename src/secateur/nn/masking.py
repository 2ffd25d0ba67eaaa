"""The reference that slicing must equal: units silenced in place, nothing removed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

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
        norm: a module from [..., n], perhaps with a gate [..., n], to [..., n], whose parameters are [n].
        alive: bool, [n].
    """
    small = copy.deepcopy(norm)
    slice_tensors_(small, {n: {0: alive} for n, p in small.named_parameters() if p.shape == alive.shape})
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (int(alive.sum()),)  # type: ignore[assignment]

    def kept(value: Any) -> Any:
        return value[..., alive] if isinstance(value, Tensor) and value.shape[-1:] == alive.shape else value

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = torch.zeros_like(x)
        out[..., alive] = small(kept(x), *map(kept, args), **{k: kept(v) for k, v in kwargs.items()})
        return out

    norm.forward = forward


def mute_experts_(module: nn.Module, alive: Mapping[str, Tensor]) -> None:
    """Make a module's router give the experts that go a logit of minus infinity, so that it ranks them last.

    Softmax over the rest, and the choice of the best, are then what they are without them.

    Args:
        module: runs router and experts; its class is changed, nothing else.
        alive: for each of the router's parameters and buffers, which entries along its expert axis stay (bool, [E]).
    """

    class Muted(type(module)):  # type: ignore[misc]
        def forward(self, *args, **kwargs):
            with _Router({get_tensor(self, name): mask for name, mask in alive.items()}):
                return super().forward(*args, **kwargs)

    Muted.__name__ = f"Muted{type(module).__name__}"
    module.__class__ = Muted


class _Router(TorchDispatchMode):
    """Sets logits to minus infinity wherever they are made: products with the router's weight, sums with its bias."""

    SAME = frozenset(
        {"t", "transpose", "permute", "view", "unsqueeze", "squeeze", "expand", "detach", "alias", "clone", "_to_copy"}
    )
    LOGITS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "add", "add_"})

    def __init__(self, alive: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self.alive: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for tensor, mask in alive.items():
            self.alive[tensor] = mask

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        mask = next((self.alive[t] for t in args if isinstance(t, Tensor) and t in self.alive), None)
        if mask is not None and name in self.SAME:
            self.alive[out] = mask
        elif mask is not None and name in self.LOGITS and out.shape[-1] == len(mask):
            out[..., ~mask] = float("-inf")
        return out
