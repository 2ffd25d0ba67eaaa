"""`global`: all units of all groups in one ranking, at their true cost.

Source: FLAP (arXiv 2312.11983) ranks standardised scores of heads and neurons together with cost weights; Isomorphic
Pruning (arXiv 2407.04616) ranks only within classes of equal structure. Costs are computed, not tabulated.

Options: standardise ("none", "mean": divide by the group's mean, "zscore"), per_class (rank within structure classes,
each giving the same share).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.allocation.base import Problem, allocator, check_reachable, evened, largest_within, nearest
from secateur.errors import BudgetError


@allocator("global", options=("standardise", "per_class"), blocks=True)
def rank(problem: Problem) -> dict[str, int]:
    """The units worth most per parameter (or multiply-accumulate) stay, whatever group they are in."""
    check_reachable(problem)
    how = str(problem.options.get("standardise", "mean"))
    worth = {g.name: _standardise(problem.scores.values[g.name], how) / problem.unit_cost(g) for g in problem.groups}
    classes = list(problem.classes().values()) if problem.options.get("per_class") else [problem.groups]
    ranks: dict[str, Tensor] = {}
    for groups in classes:
        everything = torch.cat([worth[g.name] for g in groups]).sort(descending=True).values
        cost = torch.cat([torch.full((g.size,), problem.unit_cost(g)) for g in groups])
        order = torch.cat([worth[g.name] for g in groups]).argsort(descending=True, stable=True)
        share = torch.cumsum(cost[order], 0) / cost.sum()
        for g in groups:
            # By which share of the class's cost is a unit of this worth reached?
            ranks[g.name] = share[torch.searchsorted(-everything, -worth[g.name]).clamp_max(len(share) - 1)]
    allowed = {g.name: problem.allowed(g) for g in problem.groups}

    def at(share: float) -> dict[str, int]:
        return evened(problem, {n: nearest(a, int((ranks[n] <= share).sum())) for n, a in allowed.items()})

    return largest_within(problem, at)


def _standardise(values: Tensor, how: str) -> Tensor:
    if how == "none":
        return values
    if how == "mean":
        return values / values.mean().abs().clamp_min(1e-30)
    if how == "zscore":
        z = (values - values.mean()) / values.std().clamp_min(1e-30)
        return z - z.min() + 1e-6  # worth per cost needs positive numbers
    raise BudgetError(f"standardise '{how}' is not known; use none, mean or zscore")
