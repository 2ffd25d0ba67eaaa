"""`cfsp`: every block keeps a share that grows with how much it turns the residual stream; the coarse part of CFSP.

Source: CFSP (COLING 2025, arXiv 2409.13199): with I_i the angle between a block's input and output, keep_i is
proportional to sigmoid(a (I_i - mean I)), and at most 1. The published sums over 262 thousand tokens, divided by 10^4,
are mean angles times 26 here, so that the number of tokens does not matter.

Options: scale (26).
"""

from __future__ import annotations

import torch

from secateur.allocation.base import Problem, allocator, check_reachable, evened, largest_within, nearest
from secateur.errors import BudgetError


@allocator("cfsp", options=("scale",))
def cfsp(problem: Problem) -> dict[str, int]:
    """Counts by the importance of the block; groups outside all blocks are as important as the mean."""
    check_reachable(problem)
    blocks, turns = problem.anatomy.blocks, problem.scores.blocks
    if len(turns) != len(blocks) or not len(blocks):
        raise BudgetError("allocator 'cfsp' needs how much every block turns the stream: score with fresh statistics")
    angles = turns[:, 1]
    importance = torch.sigmoid(float(problem.options.get("scale", 26.0)) * (angles - angles.mean()))
    worth = {g.name: _of_block(g.owner, blocks, importance) for g in problem.groups}
    allowed = {g.name: problem.allowed(g) for g in problem.groups}
    sizes = {g.name: g.size for g in problem.groups}
    most = 1.0 / min(worth.values())

    def at(share: float) -> dict[str, int]:
        wanted = {n: sizes[n] * min(1.0, share * most * worth[n]) for n in allowed}
        return evened(problem, {n: nearest(a, wanted[n]) for n, a in allowed.items()})

    return largest_within(problem, at)


def _of_block(owner: str, blocks: tuple[str, ...], importance: torch.Tensor) -> float:
    index = next((i for i, b in enumerate(blocks) if f"{owner}.".startswith(f"{b}.")), None)
    return float(importance.mean() if index is None else importance[index])
