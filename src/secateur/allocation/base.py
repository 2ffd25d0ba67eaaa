"""What an allocator is given, what it gives back, and the registry.

An allocator is one function from a `Problem` to how many units each group keeps. Which ones those are is settled, the
best by score, unless the allocator says which. `Problem` knows which counts are allowed (floors, alignment) and what
they cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Keeps, Kind, PrunableGroup
from secateur.criteria.score import Scores
from secateur.errors import BudgetError
from secateur.registry import Registry


@dataclass(frozen=True)
class Problem:
    """One allocation to be solved.

    Attributes:
        scores: values and curves, by group.
        anatomy: of the model.
        kind: "params" or "macs".
        target: how many of them may remain.
        floor: least share of every group that stays.
        align: counts of neurons and channels are multiples of this (or the whole group).
        uniform: groups of one structure class keep the same count.
        options: of the allocator.
        model, data: for allocators that measure; None otherwise.

    Raises:
        BudgetError: floor or align make no sense.
    """

    scores: Scores
    anatomy: Anatomy
    kind: str
    target: float
    floor: float = 0.1
    align: int = 8
    uniform: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    data: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1 or self.align < 1:
            raise BudgetError(f"floor is a share below 1 and align at least 1, found {self.floor} and {self.align}")

    @property
    def groups(self) -> list[PrunableGroup]:
        """Groups that take part, in order of execution."""
        every = {**self.anatomy.cuttable, **self.anatomy.removable}
        return [g for n, g in self.anatomy.groups.items() if n in every and n in self.scores.values]

    def unit_cost(self, group: PrunableGroup) -> float:
        return group.unit_params if self.kind == "params" else group.unit_macs

    def units(self, group: PrunableGroup, keeps: Keeps) -> tuple[int, ...]:
        """The indices of the units that stay: of so many, the best by score, and those that must."""
        if not isinstance(keeps, int):
            return tuple(sorted(keeps))
        values = self.scores.values[group.name].clone()
        values[list(group.fixed)] = float("inf")
        return best_units(values, keeps)

    def cost(self, kept: Mapping[str, Keeps]) -> float:
        """What remains of the budgeted quantity, exactly; blocks differ in cost, so it matters which of them stay."""
        which = {
            n: self.units(self.anatomy.groups[n], k)
            for n, k in kept.items()
            if self.anatomy.groups[n].kind is Kind.BLOCKS and len(self.scores.values[n])
        }
        kept = {**kept, **which}
        return self.anatomy.params_after(kept) if self.kind == "params" else self.anatomy.macs_after(kept)

    def allowed(self, group: PrunableGroup) -> list[int]:
        """Counts that a group may keep, ascending, the whole group included."""
        align = self.align if group.kind in (Kind.HIDDEN, Kind.CHANNELS, Kind.RESIDUAL) else 1
        step = math.lcm(align, group.multiple)
        least = max(group.least, -(-int(self.floor * group.size * 1_000_000) // 1_000_000), min(step, group.size))
        least = max(least, len(group.fixed))
        counts = [k for k in range(step, group.size, step) if k >= least]
        return [*counts, group.size]

    def classes(self) -> dict[tuple, list[PrunableGroup]]:
        """Groups of the same kind and size and with units of the same cost."""
        out: dict[tuple, list[PrunableGroup]] = {}
        for group in self.groups:
            out.setdefault((group.kind, group.size, round(group.unit_params)), []).append(group)
        return out


@dataclass(frozen=True)
class Allocator:
    """An allocation rule.

    Attributes:
        allocate: from a problem to counts by group, or to the indices that stay.
        curves: it needs error curves.
        measures: it runs the model on data.
        blind: it looks at sizes and costs only, not at scores.
        options: names of the options it reads.
        blocks: it can choose among whole blocks.
    """

    allocate: Callable[[Problem], dict[str, Any]]
    curves: bool = False
    measures: bool = False
    blind: bool = False
    options: tuple[str, ...] = ()
    blocks: bool = False


allocators: Registry[Allocator] = Registry("allocator")


def allocator(
    name: str,
    *,
    curves: bool = False,
    measures: bool = False,
    blind: bool = False,
    options: tuple[str, ...] = (),
    blocks: bool = False,
):
    """Decorator: register a function from `Problem` to counts (or indices) as an allocator."""

    def add(function: Callable[[Problem], dict[str, Any]]) -> Callable[[Problem], dict[str, Any]]:
        allocators.register(name)(Allocator(function, curves, measures, blind, options, blocks))
        return function

    return add


def nearest(allowed: list[int], wanted: float) -> int:
    """The allowed count closest to a number."""
    return min(allowed, key=lambda k: (abs(k - wanted), k))


def check_choice(method: str, groups: Iterable[PrunableGroup]) -> None:
    """Refuse an allocator that cannot choose among whole blocks where it would have to.

    Raises:
        BudgetError: with those that can.
    """
    if not allocators.get(method).blocks and any(g.kind is Kind.BLOCKS for g in groups):
        able = ", ".join(n for n in allocators if allocators.get(n).blocks)
        raise BudgetError(f"allocator '{method}' cannot choose among whole blocks; use one of {able}")


def check_reachable(problem: Problem) -> None:
    """Refuse a target below what the floors leave.

    Raises:
        BudgetError: with the smallest share that can be reached.
    """
    least = problem.cost({g.name: problem.allowed(g)[0] for g in problem.groups})
    if least > problem.target:
        dense = problem.cost({})
        raise BudgetError(
            f"the budget of {problem.target / dense:.1%} of the {problem.kind} cannot be reached: with a floor of "
            f"{problem.floor:.0%} in every group {least / dense:.1%} remain; raise the budget, or lower floor or align"
        )


def largest_within(problem: Problem, counts_at: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
    """The largest plan of a one-parameter family, growing with x in [0, 1], that meets the target."""
    low, high = 0.0, 1.0
    best = counts_at(low)
    for _ in range(60):
        middle = (low + high) / 2
        counts = counts_at(middle)
        if problem.cost(counts) <= problem.target:
            low, best = middle, counts
        else:
            high = middle
    return best


def evened(problem: Problem, counts: dict[str, int]) -> dict[str, int]:
    """With `uniform` asked for: one count for all groups of a structure class, the allowed one nearest the mean."""
    if not problem.uniform:
        return counts
    out = dict(counts)
    for groups in problem.classes().values():
        mean = sum(counts[g.name] for g in groups) / len(groups)
        out |= {g.name: nearest(problem.allowed(g), mean) for g in groups}
    return out


def best_units(values: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the highest scores, ascending."""
    top = values.argsort(descending=True, stable=True)[:count]
    return tuple(int(i) for i in torch.sort(top).values)
