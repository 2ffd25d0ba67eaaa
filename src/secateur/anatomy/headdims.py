"""Dimensions of heads as groups of each layer: queries with keys, and values, with the proof that attention runs so.

The tracer finds one leaf for the query/key dimensions of all layers that share a rotary table: cos and sin are made
from one vector of frequencies, and dimension i turns together with i + d/2, so a unit is a pair. Since every layer may
gather its own entries of the tables, the leaf is taken apart into one group a layer. Values have a leaf of their own in
each layer. Neither can be cut while one `head_dim` counts both; `secateur.nn.narrow` gives each its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.anatomy.dims import Dim, Form
from secateur.anatomy.groups import NOT_YET
from secateur.anatomy.headproof import first_units, inputs_of, narrowed, prove_heads
from secateur.anatomy.trace import Trace
from secateur.anatomy.types import AxisUse, CostTerm, Kind, PrunableGroup, Slot
from secateur.nn.narrow import QK, VO, Narrowing

FUSED = "queries, keys and values do not come from projections of their own with heads of one size"
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
    out, parts, places = _apart(groups, leaves, trace)
    wanted = {n: out[n] for n in places if str(out[n].kind) in proved}
    inputs = inputs_of(model, {path for n in wanted for path in (out[n].owner, places[n][0])}, run) if wanted else {}
    known: dict[tuple, str] = {}
    for name, group in wanted.items():
        path, size = places[name]
        how = _narrowing(path, size, [out[n] for n in places if places[n][0] == path], inputs.get(path))
        if how is None:
            out[name] = replace(group, reason=FUSED)
            continue
        owner = model.get_submodule(group.owner)
        shapes = tuple((n, tuple(p.shape)) for n, p in owner.named_parameters())
        key = (group.kind, group.size, type(owner), path.removeprefix(group.owner), shapes)
        if key not in known:
            known[key] = prove_heads(narrowed(group, how), owner, inputs.get(group.owner))
        out[name] = replace(group, reason=known[key]) if known[key] else narrowed(group, how)
    return out, parts


def _apart(
    groups: dict[str, PrunableGroup], leaves: dict[str, Dim], trace: Trace
) -> tuple[dict[str, PrunableGroup], dict[str, dict[str, str]], dict[str, tuple[str, int]]]:
    """All groups, those of head dimensions one a layer.

    Returns:
        The groups; for each name that was taken apart, the new names by layer; and for each group of head dimensions
        the path of its attention and the size of a head.
    """
    out: dict[str, PrunableGroup] = {}
    parts: dict[str, dict[str, str]] = {}
    places: dict[str, tuple[str, int]] = {}
    waiting: dict[str, PrunableGroup] = {}
    for name, group in groups.items():
        found = group.reason in (NOT_YET[Kind.QK_DIM], NOT_YET[Kind.VO_DIM])
        layers = _by_layer(group, _owners(trace, trace.space.find(leaves[name]), group.kind)) if found else {}
        if not layers:
            out[name] = group
            continue
        if [part.name for part in layers.values()] != [name]:
            parts[name] = {owner: part.name for owner, part in layers.items()}
        size = _head_size(trace, group, leaves[name])
        places |= {part.name: (owner, size) for owner, part in layers.items()}
        if len(layers) > 1:
            waiting |= layers  # each goes where its layer's values are
        else:
            out |= {part.name: part for owner in layers if (part := waiting.pop(owner, None))}
            out |= {part.name: part for part in layers.values()}
    out |= {part.name: part for part in waiting.values()}
    return out, parts, places


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
        units = first_units(group)
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
