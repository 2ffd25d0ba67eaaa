"""Whole blocks and whole experts: modules of a list, any of which could be left out; declared, not cut by slicing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.anatomy.stacks import find_stack
from secateur.anatomy.trace import Trace
from secateur.anatomy.types import CostTerm, Kind, PrunableGroup

LISTED = "experts in a list are declared, but not cut by slicing; the hidden units of each are"


def repeated_blocks(trace: Trace, model: nn.Module) -> dict[str, list[str]]:
    """For each container, the paths of its children of one class whose output has the very axes of their input."""
    calls = {call.path: call for call in reversed(trace.calls)}
    found: dict[str, list[str]] = {}
    experts = expert_lists(trace, model)
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) or path in experts:
            continue
        alike: dict[type, list[str]] = {}
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            call = calls.get(child_path)
            if call is None or not call.first or not any(True for _ in child.parameters()):
                continue
            same = [trace.space.find(d) for d in call.first] == [trace.space.find(d) for d in call.result]
            if same and next(child.children(), None) is not None:
                alike.setdefault(type(child), []).append(child_path)
        best = max(alike.values(), key=len, default=[])
        if len(best) > 1:
            found[path] = best
    return found


def block_order(trace: Trace, model: nn.Module) -> tuple[str, ...]:
    """Paths of all outermost repeated blocks, in order of execution, each called once."""
    paths = {p for members in repeated_blocks(trace, model).values() for p in members}
    calls = [c.path for c in trace.calls if c.path in paths]
    outer = [p for p in calls if not any(p != q and p.startswith(q + ".") for q in paths)]
    return tuple(p for p in outer if calls.count(p) == 1)


def expert_lists(trace: Trace, model: nn.Module) -> dict[str, list[str]]:
    """For each list of modules among which a router beside it chooses, their paths."""
    found: dict[str, list[str]] = {}
    for dim, count in trace.picks:
        routers = {
            e.module for e in trace.contractions if e.weights and trace.space.find(e.features) is trace.space.find(dim)
        }
        for parent in {p for path in routers if count < dim.size for p in _ancestors(path)}:
            for name, child in model.get_submodule(parent).named_children():
                if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and len(child) == dim.size:
                    path = f"{parent}.{name}" if parent else name
                    found[path] = [f"{path}.{key}" for key, _ in child.named_children()]
    return found


def _ancestors(path: str, levels: int = 2) -> list[str]:
    """The modules around one: a router may be wrapped."""
    out = []
    for _ in range(levels):
        path = path.rpartition(".")[0]
        out.append(path)
    return list(dict.fromkeys(out))


def listed_experts(trace: Trace, model: nn.Module, macs: tuple[CostTerm, ...]) -> dict[str, PrunableGroup]:
    """A group of kind EXPERTS, which is not cut, for every list of experts."""
    out = {}
    for path, members in expert_lists(trace, model).items():
        weight = sum(p.numel() for m in members for p in model.get_submodule(m).parameters())
        inside = tuple(m + "." for m in members)
        work = sum(
            term.amount
            for term, event in zip(macs, trace.contractions, strict=True)
            if (event.module + ".").startswith(inside)
        )
        name = f"{path}:{Kind.EXPERTS}"
        out[name] = PrunableGroup(
            name=name,
            kind=Kind.EXPERTS,
            size=len(members),
            owner=path,
            slots=(),
            reason=LISTED,
            unit_params=weight / len(members),
            unit_macs=work / len(members),
        )
    return out


def block_groups(
    trace: Trace, model: nn.Module, forward: Callable[[nn.Module, Any], Any], example: Any
) -> dict[str, PrunableGroup]:
    """A group of kind BLOCKS for every stack of repeated blocks, without its cost.

    Args:
        forward: how to call the model, in eval mode, on the example.
    """
    out = {}
    for path, members in repeated_blocks(trace, model).items():
        stack, fixed, reason = find_stack(trace, model, forward, example, path, members)
        name = f"{path}:{Kind.BLOCKS}"
        out[name] = PrunableGroup(
            name=name,
            kind=Kind.BLOCKS,
            size=len(members),
            owner=path,
            slots=(),
            reason=reason,
            stack=stack,
            fixed={} if reason else fixed,
        )
    return out


def in_blocks(
    terms: tuple[CostTerm, ...], names: Sequence[Collection[str]], groups: Mapping[str, PrunableGroup]
) -> tuple[CostTerm, ...]:
    """Cost terms that know the blocks they lie in.

    Args:
        names: for each term, the dotted names of what costs: of a tensor all names, of a contraction its module.
        groups: of kind BLOCKS.
    """
    places = [(g.name, i, m + ".") for g in groups.values() if g.stack for i, m in enumerate(g.stack.members)]

    def of(term_names: Collection[str]) -> tuple[tuple[tuple[str, int], ...], ...]:
        inside = [tuple((g, i) for g, i, m in places if f"{n}.".startswith(m)) for n in term_names]
        return tuple(inside) if all(inside) else ()

    return tuple(replace(term, blocks=of(n)) for term, n in zip(terms, names, strict=True))


def with_block_costs(
    groups: dict[str, PrunableGroup], params: tuple[CostTerm, ...], macs: tuple[CostTerm, ...]
) -> dict[str, PrunableGroup]:
    """The groups with the mean cost of a block."""

    def mean(terms: tuple[CostTerm, ...], group: PrunableGroup) -> float:
        mine = (t.amount for t in terms if any(n == group.name for inside in t.blocks for n, _ in inside))
        return sum(mine) / group.size

    return {
        n: replace(g, unit_params=mean(params, g), unit_macs=mean(macs, g)) if g.stack else g for n, g in groups.items()
    }
