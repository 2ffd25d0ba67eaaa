"""How much error a group makes at every width, from the statistics alone.

Keep the best k features K, let the consumer take over the removed ones P by regression: the output error is
    E(k) = tr( W_P^T (S_PP - S_PK S_KK^-1 S_KP) W_P ).
With the features ordered best first and S = L L^T, the Schur complement is L[k:, k:] L[k:, k:]^T, so that
    E(k) = sum over j >= k of || (L^T W)_j ||^2:
one Cholesky factor gives the whole curve, for any order.

Shapes: U units, N features, D outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.base import GroupView
from secateur.linalg import damped_cholesky
from secateur.models import TextSpec, source_of


def error_curve(view: GroupView, scores: Tensor, damping: float = 1e-4) -> Tensor | None:
    """[U + 1]: predicted error when the best 0, 1, ..., U units stay; None without covariances.

    The error of the consumer's output is taken relative to the variance of that output, times the share of the
    residual stream that the consumer writes: it is the error relative to the stream, as the next norm will see it. A
    language model's stream is dominated by a few tokens and directions that say little about the error of its
    prediction; there the error is scaled with the Fisher information at the consumer's output instead, where it was
    collected: that is the expected rise of the loss, up to a factor.
    """
    language = isinstance(source_of(view.model).input, TextSpec)
    total: Tensor | None = None
    for reading in view.readings():
        if reading.sums is None or reading.sums.outer.numel() == 0:
            continue
        own = reading.units >= 0
        covariance = reading.sums.covariance
        weight = reading.weight.double()
        variance = (weight * (covariance @ weight)).sum().clamp_min(1e-30)
        curve = _curve(covariance[own][:, own], weight[own], reading.units[own], scores, damping)
        sensitivity = reading.sums.sensitivity if language else None
        curve = curve * (reading.sums.stream_share / variance if sensitivity is None else sensitivity)
        total = curve if total is None else total + curve
    return total


def _curve(covariance: Tensor, weight: Tensor, units: Tensor, scores: Tensor, damping: float) -> Tensor:
    best_first = scores.argsort(descending=True, stable=True)
    rank = torch.empty_like(best_first)
    rank[best_first] = torch.arange(len(best_first))
    order = rank[units].argsort(stable=True)
    covariance, weight = covariance[order][:, order], weight[order]
    factor = damped_cholesky(covariance, damping)
    steps = (factor.T @ weight).square().sum(1)
    per_unit = torch.zeros(len(scores), dtype=torch.double).index_add_(0, rank[units[order]], steps)
    return torch.cat([per_unit.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.double)])
