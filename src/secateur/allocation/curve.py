"""`curve`: the widths with the smallest summed predicted error that fit the budget.

Each group has a curve (predicted error of the features at every width, `secateur.criteria.curves`) and a cost per unit.
The minimum of the sum under the budget is found exactly by dynamic programming over the set of undominated
(cost, error) pairs; where that set grows beyond `LIMIT`, costs are rounded up to a grid so fine that the plan is
within 1/LIMIT of the budget. Compare ZipLM (arXiv 2302.04089), which searches where this computes.

Options: power (exponent on the predicted errors, 1.0).
"""

from __future__ import annotations

import numpy as np

from secateur.allocation.base import Problem, allocator, check_reachable
from secateur.anatomy.types import PrunableGroup
from secateur.errors import BudgetError

LIMIT = 60_000


@allocator("curve", curves=True, options=("power",))
def curve(problem: Problem) -> dict[str, int]:
    """Counts that minimise the summed curves, at most at the target."""
    check_reachable(problem)
    missing = [g.name for g in problem.groups if g.name not in problem.scores.curves]
    if missing:
        raise BudgetError(
            f"allocator 'curve' needs error curves, '{missing[0]}' has none: calibrate with covariance=True, or use "
            "'uniform' or 'global'"
        )
    dense = problem.cost({})
    free = dense - problem.target
    total = sum(problem.unit_cost(g) * g.size for g in problem.groups)
    # Costs add up only where groups share no weight; elsewhere the additive budget is moved until the true one is met.
    budget = total - free
    best = solve(problem, budget)
    low, high = 0.0, total
    for _ in range(30):
        true = problem.cost(best)
        if true <= problem.target and problem.target - true < 1e-3 * dense:
            break
        low, high = (budget, high) if true <= problem.target else (low, budget)
        if high - low < 1e-6 * total:
            break
        step = budget + (problem.target - true)
        budget = step if low < step < high else (low + high) / 2
        candidate = solve(problem, budget)
        if problem.cost(candidate) <= problem.target or problem.cost(best) > problem.target:
            best = candidate
    return best


def solve(problem: Problem, budget: float) -> dict[str, int]:
    """The exact minimum of the summed errors subject to a sum of unit costs.

    Raises:
        BudgetError: no combination fits.
    """
    power = float(problem.options.get("power", 1.0))
    items = list(problem.classes().values()) if problem.uniform else [[g] for g in problem.groups]
    costs, errors, choices = np.zeros(1), np.zeros(1), []
    for groups in items:
        counts = problem.allowed(groups[0])
        cost = np.array([sum(problem.unit_cost(g) for g in groups) * k for k in counts])
        error = sum(_errors(problem, g, counts, power) for g in groups)
        all_costs = (costs[:, None] + cost).ravel()
        all_errors = (errors[:, None] + error).ravel()
        keep = _undominated(all_costs, all_errors, budget)
        choices.append((counts, keep % len(counts), keep // len(counts)))
        costs, errors = all_costs[keep], all_errors[keep]
    if not len(costs):
        raise BudgetError(f"no combination of widths fits the budget of {problem.kind}; lower the floor")
    state = int(errors.argmin())
    kept: dict[str, int] = {}
    for groups, (counts, chosen, parent) in zip(reversed(items), reversed(choices), strict=True):
        kept |= {g.name: counts[chosen[state]] for g in groups}
        state = int(parent[state])
    return kept


def _errors(problem: Problem, group: PrunableGroup, counts: list[int], power: float) -> np.ndarray:
    values = problem.scores.curves[group.name].double().numpy()
    return np.maximum(values[counts], 0.0) ** power


def _undominated(costs: np.ndarray, errors: np.ndarray, budget: float) -> np.ndarray:
    """Indices of states within the budget that no cheaper one beats; thinned to LIMIT by cost."""
    within = np.flatnonzero(costs <= budget * (1 + 1e-12))
    order = within[np.lexsort((errors[within], costs[within]))]
    best = np.minimum.accumulate(errors[order]) if len(order) else errors[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = best[1:] < best[:-1]
    kept = order[first]
    if len(kept) > LIMIT:
        cells = np.floor(costs[kept] / budget * LIMIT).astype(np.int64)
        last = np.append(cells[1:] != cells[:-1], True)  # the best error within a cell is the costliest state
        kept = kept[last]
    return kept
