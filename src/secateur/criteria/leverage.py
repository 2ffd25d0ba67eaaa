"""`leverage`: ridge leverage scores of the units' second moment, the Nystrom selection of MoDeGPT.

Source: MoDeGPT (arXiv 2408.09632), type I: score_j = [C (C + lam I)^-1]_jj with C = E[h h^T]; units that others
cannot express score high. For units of several features (heads) the scores are added.

Options: ridge (relative to the mean diagonal, 1e-2).
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion, need


@criterion("leverage", covariance=True, weighting="features", options=("ridge",))
def leverage(view: GroupView) -> Tensor:
    """[U]: sum over a unit's features of its ridge leverage score."""
    ridge = float(view.option("ridge", 1e-2))
    out = torch.zeros(view.size)
    for reading in view.readings():
        own = reading.units >= 0
        moment = need(reading).second_moment.double()[own][:, own]
        n = moment.shape[0]
        damped = moment + ridge * moment.diagonal().mean().clamp_min(1e-12) * torch.eye(n, dtype=torch.double)
        scores = torch.linalg.solve(damped, moment).diagonal().float()
        out += view.per_unit(scores, reading.units[own])
    return out
