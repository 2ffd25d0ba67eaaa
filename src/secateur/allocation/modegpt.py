"""`modegpt`: blocks that turn the residual stream more keep more.

Source: MoDeGPT (arXiv 2408.09632): sparsities phi maximise sum_i s_i (1 - phi_i) + eps * entropy(phi) at a given mean,
which gives phi_i = L * mean phi * softmax(-s_i / eps), s_i the influence of block i (1 - cosine of its input and
output). What exceeds a cap is shared out over the other blocks in the same proportions. All groups of a block give the
same share; groups outside the blocks give the mean.

Options: eps (0.1), cap (largest sparsity of a block, 0.8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.allocation.base import Problem, allocator, check_reachable, evened, largest_within, nearest
from secateur.errors import BudgetError


@allocator("modegpt", options=("eps", "cap"))
def modegpt(problem: Problem) -> dict[str, int]:
    """Counts by the influence of each group's block, the largest mean share that meets the target."""
    check_reachable(problem)
    blocks, turns = problem.anatomy.blocks, problem.scores.blocks
    if len(turns) != len(blocks) or not len(blocks):
        raise BudgetError(
            "allocator 'modegpt' needs how much every block turns the stream: score with statistics of a model with "
            "repeated blocks, or use 'uniform'"
        )
    eps, cap = float(problem.options.get("eps", 0.1)), float(problem.options.get("cap", 0.8))
    if eps <= 0 or not 0 < cap <= 1:
        raise BudgetError(f"eps is above 0 and cap a share, found {eps:g} and {cap:g}")
    place = {path: i for i, path in enumerate(blocks)}
    weights = torch.softmax(-turns[:, 0].double() / eps, 0)
    block = {
        g.name: next((i for path, i in place.items() if f"{g.owner}.".startswith(f"{path}.")), None)
        for g in problem.groups
    }

    def at(kept: float) -> dict[str, int]:
        phi = sparsities(weights, 1 - kept, cap).tolist()
        shares = {n: kept if i is None else 1 - phi[i] for n, i in block.items()}
        return evened(problem, {g.name: nearest(problem.allowed(g), shares[g.name] * g.size) for g in problem.groups})

    return largest_within(problem, at)


def sparsities(weights: Tensor, mean: float, cap: float) -> Tensor:
    """[L]: sparsities in proportion to the weights, none above the cap, with this mean as far as the cap lets it be.

    Args:
        weights: [L], positive.
    """
    phi, free = torch.zeros_like(weights), torch.ones_like(weights, dtype=torch.bool)
    left = mean * len(weights)
    while bool(free.any()) and left > 0:
        wanted = left * weights[free] / weights[free].sum()
        over = wanted > cap
        if not bool(over.any()):
            phi[free] = wanted
            break
        full = free.nonzero()[:, 0][over]
        phi[full] = cap
        free[full] = False
        left -= cap * len(full)
    return phi
