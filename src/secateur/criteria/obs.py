"""`obs`: greedy removal with exact downdates; the cheapest unit goes, the others take over its work, and so on.

Source: Optimal Brain Surgeon for whole columns: SparseGPT (arXiv 2301.00774), ZipLM (arXiv 2302.04089), OSSCAR.
With H = Cov(h) + damping and W the consumer, removing the features S of a unit costs
    tr( W_S ((H^-1)_SS)^-1 W_S^T ),
after which W -= W_S ((H^-1)_SS)^-1 (H^-1)_S: and H^-1 is downdated likewise. It is the only criterion here that knows
that two units duplicate one another. The centred covariance is used, since a removed mean goes into the bias.

Options: damping (relative to the mean diagonal, 1e-4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion, need
from secateur.linalg import damped_cholesky


@criterion("obs", covariance=True, losses=("features",), weighting="features", options=("damping",))
def obs(view: GroupView) -> Tensor:
    """[U]: output error accumulated by the time the unit goes, in the greedy order."""
    out = torch.zeros(view.size)
    for reading in view.readings():
        own = reading.units >= 0
        covariance = need(reading).covariance[own][:, own]
        out += greedy_removal(
            covariance,
            reading.weight[own].double(),
            reading.units[own],
            view.size,
            damping=float(view.option("damping", 1e-4)),
        )
    return out


def greedy_removal(covariance: Tensor, weight: Tensor, units: Tensor, size: int, *, damping: float = 1e-4) -> Tensor:
    """Remove units one after another and return when each went.

    Units of one feature (neurons) go a few at a time, at most one in 192 of them, which changes the order little and
    the time a lot.

    Args:
        covariance: [N, N], float64.
        weight: [N, D], the consumer, float64.
        units: [N], the unit of each feature.
        size: U.

    Returns:
        [U] float32: the error accumulated by the time each unit was removed; the last to stay scores highest.
    """
    inverse = torch.cholesky_inverse(damped_cholesky(covariance, damping))
    order = units.argsort(stable=True)
    inverse, weight = inverse[order][:, order], weight[order].clone()
    counts = torch.bincount(units, minlength=size)
    remove = _remove_features if bool((counts == 1).all()) else _remove_blocks
    gone, costs = remove(inverse, weight, counts)
    scores = torch.empty(size, dtype=torch.float64)
    scores[gone] = costs.clamp_min(0).cumsum(0)
    # A dead unit costs nothing: equal totals still keep their order.
    return (scores + 1e-7 * scores.max() * scores.argsort(stable=True).argsort() / size).float()


def _remove_features(inverse: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Order of removal and cost of each removal, units being single features."""
    size = len(counts)
    step = max(1, size // 192)
    alive = torch.arange(size)
    dead = torch.zeros(size, dtype=torch.bool)
    gone, costs = [], []
    while len(alive):
        cost = weight.square().sum(1) / inverse.diagonal()
        cost[dead] = float("inf")
        chosen = cost.topk(min(step, int((~dead).sum())), largest=False).indices
        gone.append(alive[chosen])
        costs.append(cost[chosen])
        block = torch.linalg.solve(inverse[chosen][:, chosen], inverse[chosen])  # [S, N]
        weight.addmm_(block.T, weight[chosen], alpha=-1)
        inverse.addmm_(inverse[:, chosen], block, alpha=-1)
        dead[chosen] = True
        inverse[chosen, chosen] = 1.0
        if dead.sum() * 4 > len(dead):
            left = torch.nonzero(~dead)[:, 0]
            alive, weight, inverse, dead = alive[left], weight[left], inverse[left][:, left], dead[left]
    return torch.cat(gone), torch.cat(costs)


def _remove_blocks(inverse: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Order of removal and cost of each removal, units being runs of features (heads)."""
    starts = torch.cumsum(counts, 0) - counts
    alive = list(range(len(counts)))
    gone, costs = [], []
    while alive:
        best, features, block = float("inf"), torch.empty(0), torch.empty(0)
        for unit in alive:
            own = torch.arange(int(starts[unit]), int(starts[unit] + counts[unit]))
            cost = float((weight[own] * torch.linalg.solve(inverse[own][:, own], weight[own])).sum())
            if cost < best or not len(features):
                best, features, chosen = cost, own, unit
        block = torch.linalg.solve(inverse[features][:, features], inverse[features])
        weight = weight - block.T @ weight[features]
        inverse = inverse - inverse[:, features] @ block
        inverse[features, features] = 1.0
        alive.remove(chosen)
        gone.append(chosen)
        costs.append(best)
    return torch.tensor(gone), torch.tensor(costs, dtype=torch.float64)
