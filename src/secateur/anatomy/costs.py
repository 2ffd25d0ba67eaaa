"""What a unit costs: parameters and multiply-accumulates as products of axes that groups shorten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from secateur.anatomy.dims import Dim, Misaligned
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
        inside = [leaf for leaf in dict.fromkeys(self.space.leaves(dim)) if leaf in self.names]
        if not inside:
            return None
        counts, owned = [], 0
        for leaf in inside:
            try:
                mine = int((self.space.units(dim, leaf) >= 0).sum())
            except Misaligned:
                return None
            counts.append((self.names[leaf], mine // leaf.size))
            owned += mine
        return AxisUse(dim.size, tuple(counts), product=owned > dim.size)


def with_costs(group: PrunableGroup, params: tuple[CostTerm, ...], macs: tuple[CostTerm, ...]) -> PrunableGroup:
    """The group with the cost of one unit filled in, all other groups being whole."""

    def unit(terms: tuple[CostTerm, ...]) -> float:
        whole = {group.name: group.size}
        total = 0.0
        for term in terms:
            if any(n == group.name for axis in term.axes for n, _ in axis.groups):
                ratio = 1.0
                for axis in term.axes:
                    ratio *= axis.ratio({group.name: 1}, whole | {n: 1 for n, _ in axis.groups if n != group.name})
                total += term.amount * (1 - ratio)
        return round(total, 6)

    return replace(group, unit_params=unit(params), unit_macs=unit(macs))
