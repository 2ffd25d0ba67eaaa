"""One consumer layer at the moment of the cut: what it loses, what it keeps, and its weight as a matrix.

Shapes: N input features, K kept, P removed, D output channels, S kernel positions (1 for linear layers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Consumer
from secateur.calibration.statistics import LayerSums
from secateur.errors import DataError
from secateur.nn.params import get_tensor, owner_of


@dataclass(frozen=True)
class LayerCut:
    """A consumer, and which of its inputs go.

    Attributes:
        consumer: the layer.
        alive: bool [N], inputs that stay.
        sums: statistics at its input in the dense model, if there are any.
        ridge: relative to the mean diagonal of the kept second moment.
    """

    consumer: Consumer
    alive: Tensor
    sums: LayerSums | None
    ridge: float

    def need(self) -> LayerSums:
        """The statistics.

        Raises:
            DataError: there are none.
        """
        if self.sums is None:
            raise DataError(f"no statistics at '{self.consumer.module}'; calibrate, or use compensate='none'")
        return self.sums


def kernel_positions(model: nn.Module, consumer: Consumer) -> int:
    """S, the number of kernel positions of the consumer's weight; 1 for linear layers."""
    return math.prod(get_tensor(model, consumer.weight).shape[2:])


def read_weight(model: nn.Module, consumer: Consumer) -> Tensor:
    """A copy of the consumer's weight as float64 [N, D, S]."""
    weight = get_tensor(model, consumer.weight).detach().to("cpu", torch.float64, copy=True)
    weight = weight.movedim(consumer.axis, 0)
    return weight.reshape(weight.shape[0], weight.shape[1], -1)


def write_weight_(model: nn.Module, consumer: Consumer, weight_NDS: Tensor) -> None:
    """Put back what `read_weight` gave, in place, in the parameter's own type and device."""
    parameter = get_tensor(model, consumer.weight)
    shape = parameter.movedim(consumer.axis, 0).shape
    with torch.no_grad():
        parameter.copy_(weight_NDS.reshape(shape).movedim(0, consumer.axis).to(parameter))


def add_to_bias_(model: nn.Module, consumer: Consumer, shift_D: Tensor, *, may_add: bool) -> str | None:
    """Add to the consumer's bias, giving it one if it has none and may have one.

    Returns:
        The name of a bias that was added.
    """
    module, _ = owner_of(model, consumer.weight)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        with torch.no_grad():
            bias.add_(shift_D.to(bias))
        return None
    if not may_add or not bool(shift_D.abs().max() > 0):
        return None
    weight = get_tensor(model, consumer.weight)
    module.register_parameter("bias", nn.Parameter(shift_D.to(weight), requires_grad=weight.requires_grad))
    return f"{consumer.module}.bias"
