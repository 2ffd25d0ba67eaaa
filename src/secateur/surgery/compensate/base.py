"""Compensators: how what remains takes over the work of what goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from secateur.registry import Registry
from secateur.surgery.layer import LayerCut

# From a cut and the weight [N, D, S]: the new weight [N, D, S] (rows of removed inputs are ignored) and what to add to
# the bias [D].
Refit = Callable[[LayerCut, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Compensator:
    """A way to compensate.

    Attributes:
        refit: closed form, one layer at a time, from statistics of the dense model.
        data: it needs statistics.
        sequential: after slicing, layers are refit again on the statistics of the already cut network.
    """

    refit: Refit
    data: bool = True
    sequential: bool = False


compensators: Registry[Compensator] = Registry("compensator")


def compensator(name: str, *, data: bool = True, sequential: bool = False) -> Callable[[Refit], Refit]:
    """Decorator: register a function from a `LayerCut` and a weight to a new weight and a bias shift."""

    def add(function: Refit) -> Refit:
        compensators.register(name)(Compensator(function, data, sequential))
        return function

    return add
