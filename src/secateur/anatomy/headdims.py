"""Dimensions of heads as groups of each layer: queries with keys, and values, with the proof that attention runs so.

The tracer finds one leaf for the query/key dimensions of all layers that share a rotary table: cos and sin are made
from one vector of frequencies, and dimension i turns together with i + d/2, so a unit is a pair. Since every layer may
gather its own entries of the tables, the leaf is taken apart into one group a layer. Values have a leaf of their own in
each layer. Neither can be cut while one `head_dim` counts both; `secateur.nn.narrow` gives each its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.anatomy.dims import Dim, Form
from secateur.anatomy.groups import NOT_YET
from secateur.anatomy.trace import Trace
from secateur.anatomy.types import AxisUse, CostTerm, Kind, PrunableGroup, Slot
from secateur.anatomy.verify import TOLERANCE, compare, randomise_
from secateur.errors import reason
from secateur.nn.masking import silence_
from secateur.nn.narrow import INDEX, QK, VO, Narrowing, narrow_
from secateur.nn.slicing import AttrEdit, finish_, keep_mask, slice_tensors_
from secateur.nn.trees import tensors_in

NOT_READY = "{} dimensions of heads are cut in a model prepared by secateur.rotate; whole heads are cut instead"


def with_head_dims(
    groups: dict[str, PrunableGroup],
    leaves: dict[str, Dim],
    trace: Trace,
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    *,
    proved: Collection[str] = (),
) -> tuple[dict[str, PrunableGroup], dict[str, dict[str, str]]]:
    """The groups, those of head dimensions one a layer; if asked for, those that a cut attention runs with cuttable.

    Args:
        run: a forward pass of the model.
        proved: kinds of groups to prove.

    Returns:
        The groups, and for each name that was taken apart the new names by layer.
    """
    out: dict[str, PrunableGroup] = {}
    parts: dict[str, dict[str, str]] = {}
    where: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for name, group in groups.items():
        if group.reason not in (NOT_YET[Kind.QK_DIM], NOT_YET[Kind.VO_DIM]):
            out[name] = group
            continue
        owners = _owners(trace, trace.space.find(leaves[name]), group.kind)
        layers = _by_layer(group, owners)
        if not layers:
            out[name] = group
            continue
        if [part.name for part in layers.values()] != [name]:
            parts[name] = {owner: part.name for owner, part in layers.items()}
        out |= {part.name: part for part in layers.values()}
        where |= {part.name: owner for owner, part in layers.items()}
        sizes |= dict.fromkeys((p.name for p in layers.values()), _head_size(trace, group, leaves[name]))
    wanted = {n: out[n] for n in where if str(out[n].kind) in proved}
    called = {g.owner for g in wanted.values()} | {where[n] for n in wanted}
    inputs = _inputs(model, called, run) if wanted else {}
    known: dict[tuple, str] = {}
    for name, group in wanted.items():
        path, owner = where[name], model.get_submodule(group.owner)
        shapes = tuple((n, tuple(p.shape)) for n, p in owner.named_parameters())
        key = (group.kind, group.size, type(owner), path.removeprefix(group.owner), shapes)
        together = [out[n] for n in where if where[n] == path]
        how = _narrowing(path, sizes[name], together, inputs.get(path))
        if how is None:
            why = "queries, keys and values do not come from projections of their own with heads of one size"
        else:
            if key not in known:
                known[key] = _prove(_narrowed(group, how), owner, inputs.get(group.owner))
            why = known[key]
        out[name] = _narrowed(group, how) if how is not None and not why else replace(group, reason=why)
    return out, parts


def renamed(terms: tuple[CostTerm, ...], places: list[str], parts: dict[str, dict[str, str]]) -> tuple[CostTerm, ...]:
    """Cost terms that speak of each layer's own group.

    Args:
        places: of each term, the parameter or module that it belongs to.
        parts: from `with_head_dims`.
    """

    def axis(use: AxisUse, place: str) -> AxisUse:
        names = []
        for name, count in use.groups:
            if name in parts:
                name = next((new for owner, new in parts[name].items() if f"{place}.".startswith(f"{owner}.")), "")
            if name:
                names.append((name, count))
        grids = tuple(tuple(axis(a, place) for a in grid) for grid in use.grids)
        return AxisUse(use.size, tuple(names), grids)

    return tuple(
        replace(term, axes=tuple(axis(a, place) for a in term.axes)) for term, place in zip(terms, places, strict=True)
    )


def _owners(trace: Trace, leaf: Dim, kind: Kind) -> list[str]:
    """Modules in which queries meet keys, or attention meets values, along a leaf."""
    found = []
    for event in trace.contractions:
        if not event.weights:
            dims = (event.summed,) if kind is Kind.QK_DIM else event.dims[1:3]
            if any(trace.space.contains(d, leaf) for d in dims):
                found.append(event.module)
    return list(dict.fromkeys(found))


def _head_size(trace: Trace, group: PrunableGroup, leaf: Dim) -> int:
    """Features of one head in the projections that make a group's units; 0 if they differ."""
    sizes = set()
    for slot in group.slots:
        if slot.role == "producer":
            dim = trace.space.find(trace.params[slot.name][slot.axis])
            while dim.form is Form.PRODUCT:
                dim = next(trace.space.find(p) for p in dim.parts if trace.space.contains(p, leaf))
            sizes.add(dim.size)
    return sizes.pop() if len(sizes) == 1 else 0


def _by_layer(group: PrunableGroup, owners: list[str]) -> dict[str, PrunableGroup]:
    """By the path of the attention: its own part of a group."""
    what = "query/key" if group.kind is Kind.QK_DIM else "value"
    group = replace(group, reason=NOT_READY.format(what))
    if len(owners) == 1 and group.owner:
        return {owners[0]: group}
    out = {}
    for owner in owners:
        inside = tuple(s for s in group.slots if s.name.startswith(f"{owner}.") and _is_layer(group, s))
        if any(s.role == "producer" for s in inside):
            consumers = tuple(c for c in group.consumers if c.module.startswith(f"{owner}."))
            name = f"{owner}:{group.kind}"
            out[owner] = replace(group, name=name, owner=owner, slots=inside, consumers=consumers)
    return out


def _is_layer(group: PrunableGroup, slot: Slot) -> bool:
    """Whether a slot is a weight that makes or reads units, or the bias of one; rotary frequencies are not."""
    layers = {s.name.rpartition(".")[0] for s in group.slots if s.role != "other"}
    return slot.name.rpartition(".")[0] in layers


@torch.no_grad()
def silence_heads_(root: nn.Module, group: PrunableGroup, keep: Tensor) -> None:
    """Zero, in place, what makes and reads the dimensions that go."""
    for slot in group.slots:
        if not slot.name.endswith(INDEX):
            silence_(root, slot.name, slot.axis, ~keep_mask(slot.units, keep, group.size))


def _narrowed(group: PrunableGroup, how: Narrowing) -> PrunableGroup:
    """The group with what it takes to cut it."""
    size = QK if group.kind is Kind.QK_DIM else VO
    slots = list(group.slots)
    if group.kind is Kind.QK_DIM and how.tables:
        slots.append(Slot(f"{how.module}.{INDEX}", 0, _units(group)[: how.size], "other"))
    edit = AttrEdit(how.module, size, how.size // group.size)
    return replace(group, slots=tuple(slots), edits=(edit,), narrowing=how, reason="")


def _units(group: PrunableGroup) -> Tensor:
    """[n]: the units of the first projection, in the order of its features."""
    units = next(s.units for s in group.slots if s.role == "producer")
    return units[units >= 0]


def _prove(group: PrunableGroup, owner: nn.Module, inputs: tuple | None) -> str:
    """Empty if a randomised copy of the owner gives, cut, what it gives masked; else what went wrong."""
    if inputs is None or group.narrowing is None:
        return "its module was never called"
    keep = torch.randperm(group.size, generator=torch.Generator().manual_seed(0))
    keep = keep[: max(1, group.size * 2 // 3)].sort().values
    local = _local(group)
    try:
        base = copy.deepcopy(owner)
        randomise_(base)
        masked = copy.deepcopy(base)
        silence_heads_(masked, local, keep)
        reference = _call(masked, inputs)
        if local.narrowing is None or not narrow_(base, local.narrowing):
            return f"the code of {type(owner).__name__} has no place for heads of another size"
        slice_heads_(base, local, keep)
        out = _call(base, inputs)
    except Exception as e:  # the module's own code refusing the size is an answer, not a crash
        return f"{type(owner).__name__} cannot run with smaller heads: {reason(e)}"
    failure = compare(reference, out, TOLERANCE[torch.float32])
    return failure and f"smaller heads change {type(owner).__name__}: {failure}"


def slice_heads_(root: nn.Module, group: PrunableGroup, keep: Tensor) -> None:
    """Cut the head dimensions of one narrowed layer, in place."""
    masks: dict[str, dict[int, Tensor]] = {}
    for slot in group.slots:
        masks.setdefault(slot.name, {})[slot.axis] = keep_mask(slot.units, keep, group.size)
    slice_tensors_(root, masks)
    finish_(root, masks, [(edit, group.size - len(keep)) for edit in group.edits])


def _narrowing(path: str, size: int, groups: list[PrunableGroup], inputs: tuple | None) -> Narrowing | None:
    """From which children queries, keys and values come, and which arguments are rotary tables.

    Args:
        path: of the attention.
        size: of a head.
        groups: those of its dimensions.
        inputs: with which it is called.
    """
    projections: list[tuple[str, str]] = []
    for group in groups:
        units = _units(group)
        if not size or len(units) % size or not torch.equal(units, units[:size].repeat(len(units) // size)):
            return None
        for slot in group.slots:
            child, _, leaf = slot.name.removeprefix(f"{path}.").rpartition(".")
            if slot.role == "producer":
                if "." in child or not child or leaf != "weight" or bool((slot.units < 0).any()):
                    return None
                projections.append((child, QK if group.kind is Kind.QK_DIM else VO))
    names = [child for child, _ in projections]
    if inputs is None or len(set(names)) != len(names):
        return None
    tables = tuple(
        name
        for name, value in inputs[1].items()
        if isinstance(value, (tuple, list))
        and any(isinstance(t, Tensor) and t.shape[-1:] == (size,) for t in tree_leaves(value))
    )
    return Narrowing(path, tuple(projections), size, tables)


def _inputs(model: nn.Module, owners: set[str], run: Callable[[nn.Module], Any]) -> dict[str, tuple]:
    """The arguments with which modules are called."""
    found: dict[str, tuple] = {}
    handles = []
    for path in owners:

        def before(_module, args, kwargs, path=path):
            found.setdefault(path, tree_map(_detached, (args, dict(kwargs))))

        handles.append(model.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _call(module: nn.Module, inputs: tuple) -> list[Tensor]:
    args, kwargs = copy.deepcopy(inputs)
    with torch.no_grad():
        out = module(*args, **kwargs)
    return [t.float() for t in list(tensors_in(out))[:1]]  # what else attention returns are its weights


def _local(group: PrunableGroup) -> PrunableGroup:
    prefix = len(group.owner) + 1
    return replace(
        group,
        slots=tuple(replace(s, name=s.name[prefix:]) for s in group.slots),
        edits=tuple(replace(e, module=e.module[prefix:]) for e in group.edits),
        narrowing=group.narrowing and replace(group.narrowing, module=group.narrowing.module[prefix:]),
    )
