"""Whole blocks and whole experts: modules of a list, any of which could be left out; declared, not cut by slicing."""

from __future__ import annotations

from torch import nn

from secateur.anatomy.trace import Trace
from secateur.anatomy.types import CostTerm, Kind, PrunableGroup

REASON = "whole blocks are declared, but not cut by slicing"
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


def declared_groups(
    trace: Trace, model: nn.Module, params: tuple[CostTerm, ...], macs: tuple[CostTerm, ...]
) -> dict[str, PrunableGroup]:
    """A group of kind BLOCKS for every stack of repeated blocks, one of kind EXPERTS for every list of experts."""
    out = {}
    stacks = [(Kind.BLOCKS, REASON, repeated_blocks(trace, model)), (Kind.EXPERTS, LISTED, expert_lists(trace, model))]
    for kind, reason, path, members in ((k, r, p, m) for k, r, found in stacks for p, m in found.items()):
        weight = sum(p.numel() for m in members for p in model.get_submodule(m).parameters())
        inside = tuple(m + "." for m in members)
        work = sum(
            term.amount
            for term, event in zip(macs, trace.contractions, strict=True)
            if (event.module + ".").startswith(inside)
        )
        name = f"{path}:{kind}"
        out[name] = PrunableGroup(
            name=name,
            kind=kind,
            size=len(members),
            owner=path,
            slots=(),
            reason=reason,
            unit_params=weight / len(members),
            unit_macs=work / len(members),
        )
    return out
