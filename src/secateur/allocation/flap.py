"""`flap`: all units of all groups in one ranking of their scores as they are, cut until the budget is met.

Source: FLAP (arXiv 2312.11983), for scores that are standardised within their layers (criterion `flap`). Its cost
weights (512 to 3) are computed from the shapes here.
"""

from __future__ import annotations

import torch

from secateur.allocation.base import Problem, allocator, check_reachable, evened, largest_within, nearest


@allocator("flap")
def flap(problem: Problem) -> dict[str, int]:
    """The best scores stay, whatever group they are in."""
    check_reachable(problem)
    allowed = {g.name: problem.allowed(g) for g in problem.groups}
    values = {g.name: problem.scores.values[g.name] for g in problem.groups}
    everything = torch.cat(list(values.values())).sort(descending=True).values

    def at(share: float) -> dict[str, int]:
        least = everything[min(int(share * len(everything)), len(everything) - 1)]
        return evened(problem, {n: nearest(a, int((values[n] >= least).sum())) for n, a in allowed.items()})

    return largest_within(problem, at)
