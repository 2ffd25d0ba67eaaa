"""What a unit costs: parameters and multiply-accumulates as products of axes that groups shorten."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from secateur.anatomy.dims import Dim, Form
from secateur.anatomy.trace import Trace
from secateur.anatomy.types import AxisUse, CostTerm, PrunableGroup


def cost_terms(
    trace: Trace, model: nn.Module, leaves: Mapping[str, Dim]
) -> tuple[tuple[CostTerm, ...], tuple[CostTerm, ...]]:
    """Cost terms of parameters and of multiply-accumulates (per example).

    Args:
        leaves: the leaf Dim of each group, by group name.
    """
    uses = _Uses(trace, leaves)
    params = tuple(
        CostTerm(p.numel(), uses.of(trace.params[name]))
        for name, p in model.named_parameters()  # tied ones once
    )
    macs = tuple(CostTerm(e.macs / trace.batch, uses.of(e.dims)) for e in trace.contractions)
    return params, macs


class _Uses:
    def __init__(self, trace: Trace, leaves: Mapping[str, Dim]) -> None:
        self.space = trace.space
        self.names = {self.space.find(dim): name for name, dim in leaves.items()}
        self.cache: dict[Dim, AxisUse | None] = {}

    def of(self, dims: Iterable[Dim]) -> tuple[AxisUse, ...]:
        uses = (self._use(self.space.find(d)) for d in dims)
        return tuple(u for u in uses if u is not None)

    def _use(self, dim: Dim) -> AxisUse | None:
        if dim not in self.cache:
            self.cache[dim] = self._find(dim)
        return self.cache[dim]

    def _find(self, dim: Dim) -> AxisUse | None:
        if dim.form is Form.LEAF:
            return AxisUse(dim.size, ((self.names[dim], 1),)) if dim in self.names else None
        parts = [self.space.find(p) for p in dim.parts]
        uses = [u for u in map(self._use, parts) if u is not None]
        if not uses:
            return None
        if dim.form is Form.CONCAT:
            counts: Counter[str] = Counter()
            for use in uses:
                counts.update(dict(use.groups))
            return AxisUse(dim.size, tuple(counts.items()), tuple(grid for use in uses for grid in use.grids))
        constant = dim.size // math.prod(u.size for u in uses)
        if len(uses) == 1 and not uses[0].grids:
            return AxisUse(dim.size, tuple((name, n * constant) for name, n in uses[0].groups))
        return AxisUse(dim.size, grids=((*uses, AxisUse(constant)),))


def with_costs(group: PrunableGroup, params: tuple[CostTerm, ...], macs: tuple[CostTerm, ...]) -> PrunableGroup:
    """The group with the cost of one unit filled in, all other groups being whole."""

    def unit(terms: tuple[CostTerm, ...]) -> float:
        total = 0.0
        for term in terms:
            mine = [axis for axis in term.axes if group.name in axis.names]
            if mine:
                total += term.amount * (1 - math.prod(axis.ratio({group.name: 1}) for axis in mine))
        return round(total, 6)

    return replace(group, unit_params=unit(params), unit_macs=unit(macs))
