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
from secateur.criteria.obs import damped_inverse  # noqa: F401  (re-exported for tests of the identity)


def error_curve(view: GroupView, scores: Tensor, damping: float = 1e-4) -> Tensor | None:
    """[U + 1]: predicted error when the best 0, 1, ..., U units stay; None without covariances.

    Where gradients were collected the error is that of the model's normalised features (per image), else that of the
    consumer's output relative to its variance.
    """
    total: Tensor | None = None
    for reading in view.readings():
        if reading.sums is None or reading.sums.outer.numel() == 0:
            continue
        own = reading.units >= 0
        covariance = reading.sums.covariance[own][:, own]
        weight = _in_feature_units(reading.weight[own].double(), reading.sums.metric, reading.sums)
        curve = _curve(covariance, weight, reading.units[own], scores, damping)
        total = curve if total is None else total + curve
    return total


def _in_feature_units(weight: Tensor, metric: Tensor, sums) -> Tensor:
    """Consumer weights such that squared output errors are squared feature errors per image (Fisher metric)."""
    if metric.numel() <= 1 or metric.shape[0] != weight.shape[1] or sums.energy.numel() < 2:
        return weight
    # `metric` sums g g^T over tokens and images: per token times positions per image = per image.
    positions = sums.energy.numel()
    per_token = metric.double() / sums.count.double()
    values, vectors = torch.linalg.eigh(per_token * positions)
    return weight @ (vectors * values.clamp_min(0).sqrt())


def _curve(covariance: Tensor, weight: Tensor, units: Tensor, scores: Tensor, damping: float) -> Tensor:
    best_first = scores.argsort(descending=True, stable=True)
    rank = torch.empty_like(best_first)
    rank[best_first] = torch.arange(len(best_first))
    order = rank[units].argsort(stable=True)
    covariance, weight = covariance[order][:, order], weight[order]
    eye = torch.eye(len(order), dtype=torch.double)
    scale = covariance.diagonal().mean().clamp_min(1e-12)
    while True:
        factor, failed = torch.linalg.cholesky_ex(covariance + damping * scale * eye)
        if not failed:
            break
        damping = max(damping * 10, 1e-8)
    steps = (factor.T @ weight).square().sum(1)
    per_unit = torch.zeros(len(scores), dtype=torch.double).index_add_(0, rank[units[order]], steps)
    return torch.cat([per_unit.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.double)])
