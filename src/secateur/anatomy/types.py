"""What a model is made of, as data: PrunableGroups, the slices a unit owns, and what a unit costs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from torch import Tensor

from secateur.errors import AnatomyError
from secateur.nn.narrow import Narrowing
from secateur.nn.slicing import AttrEdit
from secateur.nn.stack import Stack
from secateur.nn.stream import Stream


class Kind(StrEnum):
    """What a PrunableGroup's units are."""

    HIDDEN = "hidden"  # MLP neurons: hidden units of a pair of linear layers or 1x1 convolutions
    CHANNELS = "channels"  # channels between two convolutions
    HEADS = "heads"
    KV_GROUPS = "kv_groups"  # a key/value head with the query heads that share it
    HEAD_DIM = "head_dim"  # dimensions that queries, keys and values share in every head
    QK_DIM = "qk_dim"
    VO_DIM = "vo_dim"
    EXPERTS = "experts"  # experts among which a router chooses
    RESIDUAL = "residual"  # width of the residual stream
    BLOCKS = "blocks"  # whole blocks of a repeated stack


CUT_KINDS = frozenset({Kind.HIDDEN, Kind.CHANNELS, Kind.HEADS, Kind.KV_GROUPS, Kind.EXPERTS})
DECOMPOSED_KINDS = frozenset({Kind.RESIDUAL, Kind.QK_DIM, Kind.VO_DIM})  # cut in a model that `rotate` has prepared


@dataclass(frozen=True)
class Slot:
    """The part of one parameter or buffer that units own.

    Attributes:
        name: of the parameter or buffer.
        axis: along which units lie.
        units: [n] int64, the unit owning each index along the axis, or -1.
        role: "producer" (rows that make the unit), "consumer" (columns that read it), or "other" (bias, norm, table).
    """

    name: str
    axis: int
    units: Tensor
    role: str


@dataclass(frozen=True)
class Residual:
    """Where the stream is visible right after a consumer's output was added to it.

    Attributes:
        module: dotted path of the module that receives (or returns) the sum.
        side: "in" or "out".
        index: position among the module's tensor inputs or outputs.
        scales: parameters by which the consumer's output was multiplied before the addition (LayerScale).
        order: the stream's axes in terms of those of the consumer's output.
    """

    module: str
    side: str
    index: int
    scales: tuple[str, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a group's units; its input is where they are observed and its weight is what is refit.

    Attributes:
        module: dotted path of the layer (linear, convolution or transformers' Conv1D).
        weight: name of its weight.
        axis: the weight's input axis.
        units: [n] int64, the unit seen in each input feature, or -1.
        features: the input's feature axis (-1 for linear layers, 1 for convolutions).
        batch: the input's batch axis.
        residual: where its output enters the residual stream, if it does so linearly.
    """

    module: str
    weight: str
    axis: int
    units: Tensor
    features: int = -1
    batch: int = 0
    residual: Residual | None = None


@dataclass(frozen=True)
class PrunableGroup:
    """One dimension that can be shortened.

    Attributes:
        name: "<owner>:<kind>", stable for a given architecture.
        kind: what a unit is.
        size: number of units.
        owner: dotted path of the smallest module that holds everything a unit owns.
        slots: what a unit owns.
        consumers: layers at whose input the units can be observed.
        order: position in the order of execution.
        unit_params: parameters that go with one unit.
        unit_macs: multiply-accumulates per image that go with one unit.
        reason: why it cannot be cut; empty if it can.
        norms: dotted paths of norms over all units, whose statistics change with the cut: in front of the consumer,
            or over all queries (and keys) before they are split into heads.
        edits: attributes that count units.
        rewritten: modules whose forward must be made free of the input width first, with their head counts.
        least: fewest units that may stay (a router takes so many experts for every token).
        multiple: how many units stay, if not all, is a multiple of this (a kernel wants aligned rows).
        stream: its norms and scales, where the units are entries of the residual stream.
        narrowing: how the owner is given head sizes of its own first, where the units are dimensions of heads.
        stack: for whole blocks, where they are and what counts them.
        fixed: units that must stay, each with the reason.
    """

    name: str
    kind: Kind
    size: int
    owner: str
    slots: tuple[Slot, ...]
    consumers: tuple[Consumer, ...] = ()
    order: int = 0
    unit_params: float = 0.0
    unit_macs: float = 0.0
    reason: str = ""
    norms: tuple[str, ...] = ()
    edits: tuple[AttrEdit, ...] = ()
    rewritten: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    least: int = 1
    multiple: int = 1
    stream: Stream = field(default_factory=Stream)
    narrowing: Narrowing | None = None
    stack: Stack | None = None
    fixed: dict[int, str] = field(default_factory=dict)

    @property
    def cuttable(self) -> bool:
        return not self.reason

    def at_most(self, count: int) -> int:
        """The largest number of units up to `count` that may stay; the smallest of all where `count` is too few."""
        step = self.multiple
        return max(count - count % step, -(-self.least // step) * step)

    @property
    def norm(self) -> str | None:
        """The first of `norms`."""
        return self.norms[0] if self.norms else None


@dataclass(frozen=True)
class AxisUse:
    """How one axis of a cost term shrinks.

    Attributes:
        size: of the dense axis.
        groups: how many indices each group's unit takes with it, where they lie side by side.
        grids: stretches of the axis that are products of several shortened axes (heads x head size, packed next to
            an MLP): each is given as its factors.
    """

    size: int
    groups: tuple[tuple[str, int], ...] = ()
    grids: tuple[tuple[AxisUse, ...], ...] = ()

    @cached_property
    def names(self) -> frozenset[str]:
        """All groups that shorten this axis."""
        inner = (axis.names for grid in self.grids for axis in grid)
        return frozenset(n for n, _ in self.groups).union(*inner)

    def left(self, removed: Mapping[str, int]) -> int:
        """Indices that stay when so many units of each named group are removed."""
        gone = sum(per_unit * removed.get(name, 0) for name, per_unit in self.groups)
        for grid in self.grids:
            gone += math.prod(a.size for a in grid) - math.prod(a.left(removed) for a in grid)
        return self.size - gone

    def ratio(self, removed: Mapping[str, int]) -> float:
        return self.left(removed) / self.size


# What a group keeps: how many units, or which (for whole blocks, whose costs differ).
Keeps = int | Collection[int]


@dataclass(frozen=True)
class CostTerm:
    """Parameters of one tensor, or multiply-accumulates of one contraction, as a product of axes.

    Attributes:
        amount: in the dense model.
        axes: that groups shorten.
        blocks: for each name of the tensor (one, unless it is tied), the blocks it lies in, as (group, index); it is
            gone when under each name one of these is.
    """

    amount: float
    axes: tuple[AxisUse, ...]
    blocks: tuple[tuple[tuple[str, int], ...], ...] = ()

    def stays(self, depth: Mapping[str, Keeps], sizes: Mapping[str, int]) -> float:
        """1, or 0 if the blocks that it lies in are gone; where only counts are known, the share that stays."""
        if not self.blocks:
            return 1.0
        return max(
            math.prod(_stays(depth[group], index, sizes[group]) for group, index in inside if group in depth)
            for inside in self.blocks
        )


def _stays(keeps: Keeps, index: int, size: int) -> float:
    return keeps / size if isinstance(keeps, int) else float(index in keeps)


@dataclass(frozen=True)
class Anatomy:
    """All groups of a model, and what the model costs.

    Attributes:
        groups: by name, in order of execution; those that cannot be cut say why.
        params: number of parameters, tied ones counted once.
        macs: multiply-accumulates for one example of the traced size.
        blocks: paths of the blocks of every repeated stack, in order of execution.
    """

    groups: dict[str, PrunableGroup]
    params: int
    macs: float
    param_terms: tuple[CostTerm, ...] = field(repr=False, default=())
    mac_terms: tuple[CostTerm, ...] = field(repr=False, default=())
    input_shape: tuple[int, ...] = ()
    blocks: tuple[str, ...] = ()

    @property
    def cuttable(self) -> dict[str, PrunableGroup]:
        """Groups that are cut unless others are asked for: everything but whole blocks."""
        return {n: g for n, g in self.groups.items() if g.cuttable and g.kind is not Kind.BLOCKS}

    @property
    def removable(self) -> dict[str, PrunableGroup]:
        """Stacks out of which whole blocks can be removed."""
        return {n: g for n, g in self.groups.items() if g.cuttable and g.kind is Kind.BLOCKS}

    def group(self, name: str) -> PrunableGroup:
        if name not in self.groups:
            raise AnatomyError(f"no group '{name}'; this model has: {', '.join(list(self.groups)[:8])}, ...")
        return self.groups[name]

    def _total(self, terms: tuple[CostTerm, ...], kept: Mapping[str, Keeps]) -> float:
        known = {n: k for n, k in kept.items() if n in self.groups}
        depth = {n: k for n, k in known.items() if self.groups[n].kind is Kind.BLOCKS}
        counts = {n: k if isinstance(k, int) else len(k) for n, k in known.items() if n not in depth}
        removed = {n: self.groups[n].size - k for n, k in counts.items()}
        sizes = {n: self.groups[n].size for n in depth}
        total = 0.0
        for term in terms:
            amount = term.amount * term.stays(depth, sizes)
            for axis in term.axes:
                amount *= axis.ratio(removed)
            total += amount
        return total

    def params_after(self, kept: Mapping[str, Keeps]) -> int:
        """Exact parameter count when each named group keeps so many units (biases added by compensation aside).

        Args:
            kept: by group, how many units stay, or which; of whole blocks give which, since a count stands for that
                share of each of them.
        """
        return round(self._total(self.param_terms, kept))

    def macs_after(self, kept: Mapping[str, Keeps]) -> float:
        """Multiply-accumulates per example when each named group keeps so many units, or these."""
        return self._total(self.mac_terms, kept)
