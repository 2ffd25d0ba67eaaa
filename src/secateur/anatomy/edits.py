"""Which attributes of a module count the units of a group: candidates, in the order in which they are tried."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from itertools import combinations
from typing import Any

from torch import nn

from secateur.anatomy.dims import Dim, Misaligned
from secateur.anatomy.trace import Trace
from secateur.anatomy.types import Kind, PrunableGroup
from secateur.nn.localconfig import PREFIX
from secateur.nn.slicing import AttrEdit

LIMIT = 24  # sets of edits: where none of so many works, the code does more with the size than count
_NEVER = re.compile(r"max_|window|patch|grid|stride|kernel|seq|resol|size_|_size$|pad|depth|layer_idx|block|shift")
_HEAD_SIZE = re.compile(r"^(?!all_).*head_?(dim|size)")  # a group of heads does not shorten a head
_COUNTS = re.compile(r"^n(um)?_.*(heads?|experts)$")
_HEADS = re.compile(r"^(?!.*(dim|size|width)).*(head|n_?group)")


def candidate_edits(trace: Trace, model: nn.Module, group: PrunableGroup, leaf: Dim) -> Iterator[tuple[AttrEdit, ...]]:
    """Sets of edits to try, the most likely first.

    An attribute is a candidate when the module's own code reshaped, split or expanded an axis of just that size of
    which the group is a part. The caller decides by comparing sliced with masked.
    """
    clear: list[AttrEdit] = []
    doubtful: list[AttrEdit] = []
    called = {id(model.get_submodule(call.path)) for call in trace.calls}
    for path, axes in trace.shapes.items():
        if not (path == group.owner or path.startswith(group.owner + ".") or not group.owner):
            continue
        sizes = _sizes(trace, axes, leaf)
        if not sizes or isinstance(model.get_submodule(path), (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        if group.kind in (Kind.HEADS, Kind.KV_GROUPS):
            sizes.setdefault(leaf.size, 1)  # heads may only ever be named as batch * heads
        others = {d.size for d in axes if not trace.space.contains(d, leaf)}
        for where, attr, index, value in _named_ints(model, path, called):
            if value not in sizes:
                continue
            edit = AttrEdit(where, attr, sizes[value], index, _whole(value, sizes[value], leaf))
            certain = (
                _HEADS.search(attr)
                if value == leaf.size and group.kind in (Kind.HEADS, Kind.KV_GROUPS)
                else (value not in others)
            )
            (doubtful if _NEVER.search(attr) or not certain else clear).append(edit)
    if group.kind in (Kind.HEADS, Kind.KV_GROUPS):
        doubtful = sorted([*doubtful, *filter(_sizes_head, clear)], key=_sizes_head)
        clear = [e for e in clear if not _sizes_head(e)]
    for extra in _orders(clear, doubtful, _configured(trace, model, group, leaf))[:LIMIT]:
        yield (*group.edits, *extra)


def _orders(clear: list[AttrEdit], doubtful: list[AttrEdit], configured: list[AttrEdit]) -> list[tuple[AttrEdit, ...]]:
    """Distinct sets of candidates: the clear ones alone, with each doubtful one, with the config's, in pairs."""
    every = clear + doubtful
    # Of several equal entries in one list of sizes, perhaps only one counts these units.
    lists = {(e.module, e.attr) for e in every if e.index is not None}
    single = [
        [e for e in every if (e.module, e.attr, e.index) == (*key, i) or (e.module, e.attr) != key]
        for key in sorted(lists)
        for i in range(8)
    ]
    # Of several attributes of equal value (4 heads of size 4), perhaps only one or two do.
    names = dict.fromkeys(e.attr for e in every)
    alone = [[e for e in every if e.attr == name] for name in names]
    pairs = [set(pair) for pair in combinations(names, 2)]
    both = [[e for e in every if e.attr in pair or e in clear] for pair in pairs]
    only = [[e for e in every if e.attr in pair] for pair in pairs]
    each = dict.fromkeys((e.attr, e.index) for e in doubtful)
    added = [[*clear, *(e for e in doubtful if (e.attr, e.index) == key)] for key in each]
    shared = [[*edits, *configured] for edits in (clear, [], *alone)] if configured else []
    sets = (clear, [], *added, *shared, every, *alone, *single, *both, *only)
    return list(dict.fromkeys(tuple(dict.fromkeys(edits)) for edits in sets))


def _sizes_head(edit: AttrEdit) -> bool:
    return bool(_HEAD_SIZE.search(edit.attr))


def _configured(trace: Trace, model: nn.Module, group: PrunableGroup, leaf: Dim) -> list[AttrEdit]:
    """Numbers of heads or experts that a module may read from its config at every call."""
    out = []
    for path, axes in trace.shapes.items():
        inside = path == group.owner or path.startswith(group.owner + ".") or not group.owner
        module = model.get_submodule(path)
        config = getattr(module, "config", None)
        whole = hasattr(module, "save_pretrained")  # its config is saved with it, and stays as it is
        if not inside or config is None or whole:
            continue
        sizes = _sizes(trace, axes, leaf)
        for attr, value in vars(config).items():
            if _COUNTS.search(attr) and isinstance(value, int) and value in sizes:
                out.append(AttrEdit(path, PREFIX + attr, sizes[value], size=_whole(value, sizes[value], leaf)))
    return out


def named_leaves(trace: Trace, model: nn.Module) -> set[Dim]:
    """Leaves on whose size some module's own code may depend.

    Code does that reshapes, splits or makes a constant along them, that asks a tensor for its size, or that reshapes
    anything after having been handed a tensor with them (`B, C, H, W = x.shape`). All other sizes only standard layers
    see, which take them from their weights.
    """
    space = trace.space
    standard = (nn.Linear, nn.modules.conv._ConvNd)
    own = {path: axes for path, axes in trace.shapes.items() if not isinstance(model.get_submodule(path), standard)}
    dims = {space.find(d) for axes in own.values() for d in axes}
    dims |= {space.find(d) for call in trace.calls if call.path in own for axes in call.in_axes for d in axes}
    made = {leaf for leaf, notes in space.notes().items() if any(n.kind == "made" for n in notes)}
    return made.union(*(space.leaves(d) for d in dims))


def _whole(value: int, per_unit: int, leaf: Dim) -> int:
    """The leaf's size where a number counts nothing but its units, each so many times."""
    return leaf.size if per_unit * leaf.size == value else 0


def head_counts(model: nn.Module, path: str) -> dict[str, int]:
    """Integer attributes of a module that look like numbers of heads."""
    return {a: v for a, i, v in _ints(model.get_submodule(path)) if i is None and _HEADS.search(a)}


def _sizes(trace: Trace, axes: list[Dim], leaf: Dim) -> dict[int, int]:
    """Sizes of the axes that the leaf is part of, with the indices that one unit takes."""
    sizes: dict[int, int] = {}
    for dim in dict.fromkeys(map(trace.space.find, axes)):
        if dim.size > 1 and trace.space.contains(dim, leaf):
            try:
                owned = int((trace.space.units(dim, leaf) >= 0).sum())
            except Misaligned:
                continue
            sizes.setdefault(dim.size, owned // leaf.size)
    return sizes


def _named_ints(model: nn.Module, path: str, called: Set[int]) -> Iterator[tuple[str, str, int | None, int]]:
    """Attributes of a module, and of those inside it whose methods it runs uncalled (`rel_pos.get_bias()`)."""
    for attr, index, value in _ints(model.get_submodule(path)):
        yield path, attr, index, value
    for name, child in model.get_submodule(path).named_children():
        if id(child) not in called and not isinstance(child, (nn.Linear, nn.modules.conv._ConvNd)):
            yield from _named_ints(model, f"{path}.{name}" if path else name, called)


def _ints(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    def plain(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    for attr, value in vars(module).items():
        if attr.startswith("_"):
            continue
        if plain(value):
            yield attr, None, value
        elif isinstance(value, (tuple, list)) and len(value) <= 8 and value and all(map(plain, value)):
            for i, v in enumerate(value):
                yield attr, i, v
