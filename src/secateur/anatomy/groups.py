"""From a trace to PrunableGroups: every leaf dimension that some weights make and others read."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import dataclass, field

from torch import nn

from secateur.anatomy.dims import Dim, Misaligned, Note
from secateur.anatomy.trace import Contraction, Trace
from secateur.anatomy.types import Consumer, Kind, PrunableGroup, Residual, Slot
from secateur.nn.params import conv1d_like, owner_of
from secateur.nn.slicing import AttrEdit

NOT_YET = {
    Kind.RESIDUAL: "the residual width runs through the whole model; it is not cut by slicing alone",
    Kind.HEAD_DIM: "queries, keys and values share it through one fused projection; whole heads are cut instead",
    Kind.QK_DIM: "query/key dimensions are not cut by slicing; whole heads are cut instead",
    Kind.VO_DIM: "value dimensions share the head size with queries and keys; whole heads are cut instead",
}

MIXES = ("norm", "reduce")  # notes of what a norm does


@dataclass
class Leaf:
    """What the trace says about one leaf dimension."""

    dim: Dim
    slots: list[tuple[str, int]] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)  # batch of a contraction of two activations: heads
    paired: list[int] = field(default_factory=list)  # summed by a contraction of two activations: q . k
    carried: list[int] = field(default_factory=list)  # free axis of such a contraction: attention @ v
    grouped: list[int] = field(default_factory=list)  # groups of a convolution
    picked: int = 0  # how many of the units a router takes at most; 0 if none chooses among them
    notes: list[Note] = field(default_factory=list)


def find_leaves(trace: Trace) -> list[Leaf]:
    """Leaves that occur in parameters, with every contraction they take part in."""
    space = trace.space
    leaves: dict[Dim, Leaf] = {}
    for name, axes in trace.params.items():
        for axis, dim in enumerate(axes):
            for leaf in dict.fromkeys(space.leaves(dim)):
                leaves.setdefault(leaf, Leaf(leaf)).slots.append((name, axis))

    def each(dim: Dim, where: str, index: int) -> None:
        for leaf in dict.fromkeys(space.leaves(dim)):
            if leaf in leaves:
                getattr(leaves[leaf], where).append(index)

    for i, event in enumerate(trace.contractions):
        if event.weights:
            each(event.summed, "read", i)
            each(event.features, "made", i)
            each(event.batch, "grouped", i)
        else:
            each(event.summed, "paired", i)
            each(event.batch, "shared", i)
            # Without heads beside them (in a state space model) what is carried are plain channels.
            for dim in event.dims[1:3] if any(x in leaves for x in space.leaves(event.batch)) else ():
                each(dim, "carried", i)
    for leaf, notes in space.notes().items():
        if leaf in leaves:
            leaves[leaf].notes = notes
    _count_picks(trace, leaves)
    return list(leaves.values())


def _count_picks(trace: Trace, leaves: dict[Dim, Leaf]) -> None:
    """How many units a router takes at most; of experts in routing groups, so many that those of few groups suffice."""
    picks = [([x for x in trace.space.leaves(dim) if x in leaves], count) for dim, count in trace.picks]
    for found, count in sorted(picks, key=lambda pick: len(pick[0])):
        if found:
            *outer, inner = (leaves[x] for x in found)
            for leaf in outer:
                leaf.picked = max(leaf.picked, 1)
            inner.picked = max(inner.picked, -(-count // math.prod(leaf.picked for leaf in outer)))


def kind_of(leaf: Leaf, trace: Trace) -> Kind:
    if _are_experts(leaf, trace):
        return Kind.EXPERTS
    if leaf.shared:
        return Kind.KV_GROUPS if _shared_by_queries(leaf, trace) else Kind.HEADS
    maps_to_itself = any(i in leaf.made for i in leaf.read if trace.contractions[i].dense)
    if maps_to_itself or any(n.kind == "skip" for n in leaf.notes):
        return Kind.RESIDUAL
    if leaf.paired and leaf.carried:
        return Kind.HEAD_DIM
    if leaf.paired:
        return Kind.QK_DIM
    if leaf.carried:
        return Kind.VO_DIM
    spatial = any(trace.contractions[i].spatial for i in {*leaf.made, *leaf.read})
    return Kind.CHANNELS if spatial or (leaf.grouped and not _depthwise_only(leaf, trace)) else Kind.HIDDEN


def _shared_by_queries(leaf: Leaf, trace: Trace) -> bool:
    """Whether a unit is several heads in one projection (queries) and one in another, or beside it."""
    space = trace.space
    made = [space.find(trace.contractions[i].features) for i in leaf.made]
    for partner in {x for i in leaf.shared for x in space.leaves(trace.contractions[i].batch)} - {leaf.dim}:
        several = single = False
        for features in made:
            try:
                mine, theirs = space.units(features, leaf.dim) >= 0, space.units(features, partner) >= 0
            except Misaligned:
                continue
            several |= bool((mine & theirs).any())
            single |= bool((mine & ~theirs).any())
        if several and single:
            return True
    return False


def _depthwise_only(leaf: Leaf, trace: Trace) -> bool:
    return not any(trace.contractions[i].dense for i in leaf.grouped)


def _are_experts(leaf: Leaf, trace: Trace) -> bool:
    """Whether the data chooses among the units, each of which has a matrix of its own."""
    return bool(leaf.picked and leaf.made) and any(len(trace.params[name]) > 2 for name, _ in leaf.slots)


def _goes_on(leaf: Leaf, trace: Trace) -> bool:
    """Whether anything reads the units, or something did that could not be followed."""
    opaque = not leaf.picked and any(n.kind == "opaque" for n in leaf.notes)
    return bool(leaf.read or leaf.paired or opaque or _are_experts(leaf, trace))


class Builder:
    """Turns leaves into groups; `build` gives them in order of execution, unverified."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace, self.model, self.space = trace, model, trace.space
        self.called = {call.path: call for call in reversed(trace.calls)}
        self.notes = trace.space.notes()
        self.foreign = {leaf for axes in trace.foreign for dim in axes for leaf in self.space.leaves(dim)}
        self.names: defaultdict[str, int] = defaultdict(int)
        self.leaves: dict[str, Dim] = {}

    def build(self) -> dict[str, PrunableGroup]:
        leaves = [x for x in find_leaves(self.trace) if x.made and _goes_on(x, self.trace) and not self._boundary(x)]
        leaves.sort(key=lambda x: min([*x.made, *x.read]))
        groups = {}
        for leaf in leaves:
            group = self._group(leaf)
            if group is not None:
                groups[group.name] = group
                self.leaves[group.name] = leaf.dim
        return groups

    def _boundary(self, leaf: Leaf) -> bool:
        """Dimensions of the task, not of the model: pixels in, classes out."""
        return any(n.kind == "input" for n in leaf.notes) or (
            not leaf.read and any(n.kind == "output" for n in leaf.notes)
        )

    def _group(self, leaf: Leaf) -> PrunableGroup | None:
        kind = kind_of(leaf, self.trace)
        reason, norms = self._reason(leaf, kind)
        slots = []
        for name, axis in leaf.slots:
            try:
                units = self.space.units(self.trace.params[name][axis], leaf.dim)
            except Misaligned:
                return None
            slots.append(Slot(name, axis, units, self._role(leaf, name, axis)))
        owner = self._owner(leaf, [s.name for s in slots])
        name = f"{owner}:{kind}" if owner else f"{_parent(slots[0].name)}:{kind}"
        self.names[name] += 1
        if self.names[name] > 1:
            name = f"{name}.{self.names[name]}"
        return PrunableGroup(
            name=name,
            kind=kind,
            size=leaf.dim.size,
            owner=owner,
            slots=tuple(slots),
            consumers=tuple(self._consumers(leaf)),
            order=max(leaf.read or leaf.paired or leaf.made),
            reason=reason,
            norms=norms,
            edits=tuple(self._conv_groups(leaf)),
            least=leaf.picked if kind is Kind.EXPERTS else 1,
        )

    # -- why not --------------------------------------------------------------------------------------------------

    def _reason(self, leaf: Leaf, kind: Kind) -> tuple[str, tuple[str, ...]]:
        names = [name for name, _ in leaf.slots]
        if any(names.count(w) > 1 and self._uses(w) > 1 for w in names):
            return "one weight both makes and reads it (a tied dictionary, as in ISTA blocks)", ()
        if kind in NOT_YET:
            return NOT_YET[kind], ()
        if kind is Kind.EXPERTS and leaf.picked >= leaf.dim.size:
            return f"the router takes {leaf.picked} of {leaf.dim.size} for every token; none can go", ()
        norms: dict[str, None] = {}
        for note in leaf.notes:
            if kind is Kind.EXPERTS and note.kind in ("norm", "reduce", "softmax"):
                continue  # the router ranks them: one that is not there is one that ranks last
            if note.kind == "output":
                return "it is part of the model's output", ()
            where = f" in {note.where} ({self._class(note.where)})"
            if note.kind == "norm" or note.kind == "reduce":
                if not self._norm_before_consumer(leaf, note.where) and not self._norm_over_heads(
                    leaf, kind, note.where
                ):
                    return f"{note.text} couples all units{where}", ()
                norms[note.where] = None
            elif note.kind == "softmax":
                return f"a softmax couples all units{where}", ()
            elif note.kind == "indexed":
                return f"single units are addressed by {note.text}{where}", ()
            elif note.kind == "opaque":
                return f"the data flow could not be followed through '{note.text}'{where}", ()
        if leaf.dim in self.foreign:
            return "a constant tensor of this size is neither parameter nor buffer", ()
        return "", tuple(norms)

    def _uses(self, weight: str) -> int:
        return sum(weight in event.weights for event in self.trace.contractions)

    def _class(self, path: str) -> str:
        return type(self.model.get_submodule(path)).__name__

    def _norm_before_consumer(self, leaf: Leaf, path: str) -> bool:
        """Whether a module is a norm over just this dimension whose output goes straight into a consumer."""
        module, call = self.model.get_submodule(path), self.called.get(path)
        if call is None or next(module.children(), None) is not None or not call.first or not call.outs:
            return False
        mixed = {
            dim
            for dim, notes in self.notes.items()
            if any(n.where == path and n.kind in ("norm", "reduce") for n in notes)
        }
        readers = {self.trace.contractions[i].module for i in leaf.read}
        feeds = any(call.outs[0] in self.called[m].ins for m in readers if m in self.called)
        return feeds and mixed == {leaf.dim} and self.space.find(call.first[-1]) is leaf.dim

    def _norm_over_heads(self, leaf: Leaf, kind: Kind, path: str) -> bool:
        """Whether a module is a norm over all queries or keys at once, before they are split into heads."""
        module, call = self.model.get_submodule(path), self.called.get(path)
        if kind not in (Kind.HEADS, Kind.KV_GROUPS) or call is None or next(module.children(), None) is not None:
            return False
        if not call.first or [*map(self.space.find, call.first)] != [*map(self.space.find, call.result)]:
            return False
        width = self.space.find(call.first[-1])
        own = [self.trace.params[n] for n, _ in leaf.slots if _parent(n) == path]
        weighted = any(len(axes) == 1 and self.space.find(axes[0]) is width for axes in own)
        within = set(self.space.leaves(width))
        return weighted and all(
            dim in within for dim, notes in self.notes.items() for n in notes if n.where == path and n.kind in MIXES
        )

    # -- where ----------------------------------------------------------------------------------------------------

    def _role(self, leaf: Leaf, name: str, axis: int) -> str:
        dim = self.trace.params[name][axis]
        for role, events in (("consumer", leaf.read), ("producer", leaf.made)):
            for i in events:
                event = self.trace.contractions[i]
                if name in event.weights and len(self.trace.params[name]) > 1:
                    side = event.summed if role == "consumer" else event.features
                    if self._overlap(dim, side, leaf.dim):
                        return role
        return "other"

    def _overlap(self, a: Dim, b: Dim, leaf: Dim) -> bool:
        return self.space.contains(a, leaf) and self.space.contains(b, leaf)

    def _owner(self, leaf: Leaf, names: list[str]) -> str:
        path = os.path.commonpath(["/" + _parent(n).replace(".", "/") for n in names]).strip("/").replace("/", ".")
        while path and not self._encloses(path, leaf.dim):
            path = path.rpartition(".")[0]
        return path

    def _encloses(self, path: str, leaf: Dim) -> bool:
        call = self.called.get(path)
        if call is None:
            return False
        results = [axes for axes, live in zip(call.out_axes, self.trace.live(call), strict=True) if live]
        outside = [d for axes in (*call.in_axes, *results) for d in axes]
        return not any(self.space.contains(d, leaf) for d in outside)

    def _consumers(self, leaf: Leaf) -> list[Consumer]:
        out = []
        for i in leaf.read:
            event = self.trace.contractions[i]
            module = self.model.get_submodule(event.module)
            if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not conv1d_like(module):
                continue
            for name in sorted(event.weights):
                if _parent(name) != event.module or owner_of(self.model, name)[1] != "weight":
                    continue
                axis = 0 if conv1d_like(module) or getattr(module, "transposed", False) else 1
                try:
                    units = self.space.units(event.inputs, leaf.dim)
                except Misaligned:
                    continue
                conv = isinstance(module, nn.modules.conv._ConvNd)
                batch = self._batch_axis(event.module)
                out.append(Consumer(event.module, name, axis, units, 1 if conv else -1, batch, self._residual(event)))
        return out

    def _batch_axis(self, path: str) -> int:
        """The axis of a module's input along which examples lie."""
        call = self.called.get(path)
        axes = call.first if call else ()
        inputs = {d for d, notes in self.notes.items() if any(n.kind == "input" for n in notes)}
        return next((i for i, d in enumerate(axes[:-1]) if any(x in inputs for x in self.space.leaves(d))), 0)

    def _residual(self, event: Contraction) -> Residual | None:
        if event.residual is None or event.branch is None or event.branch.order is None:
            return None
        skip, branch = self.trace.skips[event.residual], event.branch
        plain = branch.order == tuple(range(len(branch.order or ())))
        wanted = [x for d in skip.axes for x in self.space.leaves(d)]
        seen = []
        for call in self.trace.calls:
            for side, nodes, axes in (("in", call.ins, call.in_axes), ("out", call.outs, call.out_axes)):
                if skip.node in nodes and call.path:
                    index = nodes.index(skip.node)
                    # The same tensor, or the same rows regrouped: [B, H * W, C] seen as [B, H, W, C].
                    same = [x for d in axes[index] for x in self.space.leaves(d)] == wanted
                    if same and (plain or len(axes[index]) == len(skip.axes)):
                        seen.append(Residual(call.path, side, index, branch.scales, branch.order or ()))
        here = event.module.split(".")
        return max(seen, key=lambda r: _common(r.module.split("."), here), default=None)

    def _conv_groups(self, leaf: Leaf) -> list[AttrEdit]:
        """Convolutions whose number of groups counts these units."""
        edits = []
        for i in leaf.grouped:
            event = self.trace.contractions[i]
            if isinstance(self.model.get_submodule(event.module), nn.modules.conv._ConvNd):
                units = self.space.units(event.batch, leaf.dim)
                edits.append(AttrEdit(event.module, "groups", int((units >= 0).sum()) // leaf.dim.size))
        return list(dict.fromkeys(edits))


def _common(a: list[str], b: list[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
