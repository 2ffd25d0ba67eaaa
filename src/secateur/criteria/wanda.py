"""`wanda`: activation norm times weight magnitude, summed over outputs.

Source: Wanda (arXiv 2306.11695) in the structured form of the FLAP and CFSP baselines ("Wanda-SP"):
score_j = sum_i |W_ij| * ||h_j||_2.
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion, need


@criterion("wanda")
def wanda(view: GroupView) -> Tensor:
    """[U]: sum over a unit's features of ||h||_2 * ||consumer column||_1."""
    out = torch.zeros(view.size)
    for reading in view.readings():
        sums = need(reading)
        norm = (sums.square / sums.count).sqrt()
        out += view.per_unit(norm * reading.weight.abs().sum(1), reading.units)
    return out
