"""Allocation: scores and a budget in, a Plan out. One file a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from secateur.allocation import (  # noqa: F401  (they register themselves)
    amp_bisect,
    cfsp,
    contiguous,
    curve,
    flap,
    modegpt,
    rank,
    uniform,
)
from secateur.allocation.base import Allocator, Problem, allocator, allocators, check_choice
from secateur.anatomy.types import Anatomy
from secateur.criteria.score import Scores
from secateur.errors import BudgetError, DataError
from secateur.plan import Budget, Kept, Plan
from secateur.progress import track

__all__ = ["Allocator", "Budget", "Problem", "allocate", "allocator", "allocators"]


def allocate(
    scores: Scores,
    budget: Budget | float,
    method: str = "curve",
    *,
    anatomy: Anatomy | None = None,
    kinds: Iterable[str] | None = None,
    floor: float = 0.1,
    align: int = 8,
    uniform_width: bool = False,
    model: nn.Module | None = None,
    data: Any = None,
    quality_of: Callable[[Plan], float] | None = None,
    model_name: str = "",
    **options: Any,
) -> Plan:
    """Share a cut out over the groups.

    Args:
        scores: of a model.
        budget: a Budget; a number is the share of parameters to keep.
        method: a name from `list_allocators()`.
        anatomy: of the model; that of the scores by default.
        kinds: cut only groups of these kinds ("hidden", "heads", ...).
        floor: least share of every group that stays.
        align: counts of neurons and channels are multiples of this, or the whole group.
        uniform_width: layers of one kind and size keep the same count (every engine loads that).
        model, data: for allocators that measure (amp-bisect).
        quality_of: for a budget of quality: how good the cut model of a Plan is.
        options: of the allocator, as its docstring names them.

    Raises:
        BudgetError: the budget makes no sense or cannot be reached.
        RegistryError: no such allocator, or no such option of it.
    """
    rule = allocators.get(method)
    allocators.check_options(method, options, rule.options)
    anatomy = anatomy or scores.anatomy
    if anatomy is None:
        raise DataError("give anatomy= along with scores that were loaded from a file")
    if not isinstance(budget, Budget):
        budget = Budget(params=float(budget))
    chosen = _of_kinds(scores, anatomy, kinds)
    check_choice(method, [anatomy.groups[n] for n in chosen.values])
    kind = "params" if budget.kind == "quality" else budget.kind
    dense = float(anatomy.params if kind == "params" else anatomy.macs)

    def plan_for(share: float) -> Plan:
        problem = Problem(chosen, anatomy, kind, share * dense, floor, align, uniform_width, options, model, data)
        counts = rule.allocate(problem)
        groups = {
            name: Kept(kind=str(group.kind), size=group.size, keep=problem.units(group, counts[name]))
            for name, group in anatomy.groups.items()
            if name in counts
        }
        made_by = {
            "criterion": scores.meta.get("criterion"),
            "criterion_options": scores.meta.get("options"),
            "allocator": method,
            "options": options,
            "floor": floor,
            "align": align,
            "uniform_width": uniform_width,
        }
        units = {name: kept.keep for name, kept in groups.items()}
        predicted = {
            "params": float(anatomy.params_after(units)),
            "dense_params": float(anatomy.params),
            "macs": anatomy.macs_after(units),
            "dense_macs": anatomy.macs,
        }
        mark = {"name": model_name, **scores.meta.get("fingerprint", {})}
        return Plan(model=mark, groups=groups, made_by=made_by, budget={budget.kind: budget.share}, predicted=predicted)

    if budget.kind != "quality":
        return plan_for(budget.share)
    if quality_of is None:
        raise BudgetError("a budget of quality needs images to measure it on; use compress, or give params or macs")
    return _by_quality(plan_for, quality_of, budget.share)


def _of_kinds(scores: Scores, anatomy: Anatomy, kinds: Iterable[str] | None) -> Scores:
    if kinds is None:
        chosen = dict(scores.values)
    else:
        wanted = set(kinds)
        have = {str(anatomy.groups[n].kind) for n in scores.values}
        if not wanted & have:
            raise BudgetError(
                f"no scored group is of kind {', '.join(sorted(wanted))}; this model has {', '.join(sorted(have))}"
            )
        chosen = {n: v for n, v in scores.values.items() if str(anatomy.groups[n].kind) in wanted}
    if not chosen:
        raise BudgetError("no group was scored: nothing can be cut; see `secateur inspect` for the reasons")
    return Scores(chosen, scores.curves, scores.meta, anatomy, scores.blocks, scores.between)


def _by_quality(plan_for: Callable[[float], Plan], quality_of: Callable[[Plan], float], threshold: float) -> Plan:
    """The smallest plan that is good enough: bisection on the share kept (7 cuts measured)."""
    low, high, best = 0.0, 1.0, plan_for(1.0)
    for _ in track(range(7), "Searching the budget"):
        middle = (low + high) / 2
        try:
            plan = plan_for(middle)
        except BudgetError:
            low = middle
            continue
        if quality_of(plan) >= threshold:
            high, best = middle, plan
        else:
            low = middle
    return best
