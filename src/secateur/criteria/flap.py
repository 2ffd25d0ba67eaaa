"""`flap`: fluctuation, standardised within the layer so that layers and kinds can be ranked together.

Source: FLAP (AAAI 2024, arXiv 2312.11983): WIFV_j = Var(h_j) ||W_:j||^2, the criterion `variance`. Neurons are z-scored
within their layer. Heads: channel scores are squared, z-scored within the layer, averaged over the head. Rank them with
the allocator `flap`, refit with the compensator `mean`.
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion, need


@criterion("flap")
def flap(view: GroupView) -> Tensor:
    """[U]: standardised fluctuation."""
    total, features = torch.zeros(view.size), torch.zeros(view.size)
    for reading in view.readings():
        own = reading.units >= 0
        score_N = need(reading).variance * reading.weight.square().sum(1)
        if int(torch.bincount(reading.units[own]).max()) > 1:
            score_N = score_N.square()
        z_N = (score_N - score_N[own].mean()) / score_N[own].std().clamp_min(1e-30)
        total += view.per_unit(z_N, reading.units)
        features += view.per_unit(torch.ones_like(z_N), reading.units)
    return total / features.clamp_min(1)
