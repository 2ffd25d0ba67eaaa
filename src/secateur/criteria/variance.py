"""`variance`: how much a unit varies, times what the consumer makes of it.

Source: FLAP (AAAI 2024, arXiv 2312.11983), WIFV = Var(h_j) * ||W_:j||^2; Variance-Based Pruning (arXiv 2507.12988) is
the same without the weight. A unit that is constant can be folded into the consumer's bias at no loss.
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion, need


@criterion("variance")
def variance(view: GroupView) -> Tensor:
    """[U]: sum over a unit's features of Var(h) * ||consumer column||^2."""
    out = torch.zeros(view.size)
    for reading in view.readings():
        out += view.per_unit(need(reading).variance * reading.weight.square().sum(1), reading.units)
    return out
