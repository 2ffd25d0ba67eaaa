"""`contiguous`: of whole blocks, the run through which the stream turns least.

Source: Gromov et al. (arXiv 2403.17887) with criterion `angular`; LLM-Streamline (arXiv 2403.19135) with
`block-influence`. As few blocks go as the budget allows; where a model has several stacks, the same share of each.
"""

from __future__ import annotations

from secateur.allocation.base import Problem, allocator, check_reachable, largest_within, nearest
from secateur.anatomy.types import PrunableGroup
from secateur.errors import BudgetError


@allocator("contiguous", blocks=True)
def contiguous(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Indices that stay, all but one run of each stack."""
    missing = [g.name for g in problem.groups if g.name not in problem.scores.between]
    if missing:
        raise BudgetError(
            f"allocator 'contiguous' removes runs of whole blocks, and '{missing[0]}' was not scored as such: use "
            "criterion 'angular' or 'block-influence', or another allocator"
        )
    check_reachable(problem)
    allowed = {g.name: problem.allowed(g) for g in problem.groups}

    def at(share: float) -> dict[str, tuple[int, ...]]:
        return {g.name: without_run(problem, g, nearest(allowed[g.name], share * g.size)) for g in problem.groups}

    return largest_within(problem, at)


def without_run(problem: Problem, group: PrunableGroup, count: int) -> tuple[int, ...]:
    """The indices that stay of a stack that keeps so many.

    Raises:
        BudgetError: no run of that length is free of blocks that must stay.
    """
    length = group.size - count
    between = problem.scores.between[group.name]
    starts = [i for i in range(count + 1) if not set(range(i, i + length)) & set(group.fixed)]
    if not starts:
        raise BudgetError(f"no run of {length} blocks of '{group.name}' can go; raise the budget, or use 'uniform'")
    start = min(starts, key=lambda i: float(between[i, i + length]))
    return tuple(i for i in range(group.size) if not start <= i < start + length)
