"""The algebra of tensor dimensions: which index of which tensor is the same thing as which index of another.

A `Dim` stands for one axis of some tensor. Running a model unifies Dims (an addition says that two axes index the
same units), splits them (a reshape from 384 to 6 x 64 says that a width is heads times head size), and concatenates
them (a packed SwiGLU output is two hidden widths side by side). What is left at the end, the leaves, are the
dimensions that can be shortened one index at a time, and every axis of every parameter is an expression of leaves.

A Dim is either a leaf, a product of factors (row-major, as reshape counts), or a concatenation of parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from enum import Enum

import torch


class Misaligned(Exception):
    """Two decompositions of an axis cannot be brought together (internal: the caller pins the axes)."""


class Form(Enum):
    LEAF = 0
    PRODUCT = 1
    CONCAT = 2


@dataclass(frozen=True)
class Note:
    """Why units along a Dim are not free.

    Attributes:
        kind: "input", "output", "opaque", "indexed", "softmax", "norm", "reduce" or "skip".
        where: dotted path of the module in which it happened.
        text: the operation, as a reader knows it.
    """

    kind: str
    where: str
    text: str


class Dim:
    """One axis; compare with `Space.find`, never with `is` alone."""

    __slots__ = ("form", "parent", "parts", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.parent: Dim | None = None
        self.form = Form.LEAF
        self.parts: tuple[Dim, ...] = ()


class Space:
    """All Dims of one traced model, with the notes made about them."""

    def __init__(self) -> None:
        self._notes: list[tuple[Dim, Note, frozenset[int]]] = []

    # -- building -------------------------------------------------------------------------------------------------

    def new(self, size: int) -> Dim:
        return Dim(size)

    def find(self, dim: Dim) -> Dim:
        """The representative of a Dim."""
        root = dim
        while root.parent is not None:
            root = root.parent
        while dim.parent is not None:
            dim.parent, dim = root, dim.parent
        return root

    def note(self, dim: Dim, note: Note, nodes: Iterable[int] = ()) -> None:
        """Say that units along a Dim are not free; if `nodes` are given, only as long as one of them is used."""
        if dim.size > 1:
            self._notes.append((dim, note, frozenset(nodes)))

    def forget_unused(self, used: Set[int]) -> None:
        """Drop the notes that were made about results which nothing ever read."""
        self._notes = [(dim, note, nodes) for dim, note, nodes in self._notes if not nodes or nodes & used]

    def merge(self, dims: Sequence[Dim]) -> Dim:
        """The product of Dims, outermost first, as a reshape merges axes."""
        factors = tuple(d for d in map(self.find, dims) if d.size != 1)
        if len(factors) == 1:
            return factors[0]
        out = Dim(math.prod(d.size for d in factors))
        if factors:
            out.form, out.parts = Form.PRODUCT, factors
        return out

    def concat(self, dims: Sequence[Dim]) -> Dim:
        """Dims side by side along one axis."""
        parts = tuple(d for d in map(self.find, dims) if d.size != 0)
        if len(parts) == 1:
            return parts[0]
        out = Dim(sum(d.size for d in parts))
        if parts:
            out.form, out.parts = Form.CONCAT, parts
        return out

    # -- taking apart ---------------------------------------------------------------------------------------------

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """Factors of a Dim with the given sizes, outermost first.

        Raises:
            Misaligned: the Dim is already made of pieces that these sizes would tear.
        """
        dim = self.find(dim)
        if len(sizes) == 1:
            return [dim]
        if dim.form is Form.PRODUCT:
            return self.regroup(dim.parts, sizes)
        factors = [Dim(s) for s in sizes] if dim.form is Form.LEAF else self._split_concat(dim, sizes)
        real = tuple(f for f in factors if f.size != 1)
        if len(real) > 1:
            dim.form, dim.parts = Form.PRODUCT, real
            return factors
        # All sizes but one are 1: the factor is the Dim itself.
        return [dim if f.size != 1 else f for f in factors]

    def _split_concat(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        outer, inner = sizes[0], math.prod(sizes[1:])
        if outer == 1:
            return [Dim(1), *self.split(dim, sizes[1:])]
        if inner == 1:
            return [dim, *(Dim(1) for _ in sizes[1:])]
        if any(part.size % inner for part in dim.parts):
            raise Misaligned
        shared = Dim(inner)
        outers = []
        for part in dim.parts:
            head, tail = self.split(part, [part.size // inner, inner])
            self.unify(shared, tail)
            outers.append(head)
        return [self.concat(outers), *self.split(shared, sizes[1:])]

    def cut(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """Consecutive segments of a Dim with the given sizes, as slicing or `Tensor.split` makes them.

        Raises:
            Misaligned: a segment would begin inside a factor.
        """
        dim = self.find(dim)
        sizes = list(sizes)
        if len([s for s in sizes if s]) == 1:
            return [dim if s else Dim(0) for s in sizes]
        if dim.form is Form.LEAF:
            segments = [Dim(s) for s in sizes]
            dim.form, dim.parts = Form.CONCAT, tuple(s for s in segments if s.size)
            return segments
        if dim.form is Form.PRODUCT:
            outer, rest = dim.parts[0], dim.parts[1:]
            inner = dim.size // outer.size
            if any(s % inner for s in sizes):
                raise Misaligned
            return [self.merge([h, *rest]) if h.size else h for h in self.cut(outer, [s // inner for s in sizes])]
        return self._cut_concat(dim, sizes)

    def _cut_concat(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        queue = list(dim.parts)
        segments = []
        for size in sizes:
            taken: list[Dim] = []
            while size > 0:
                part = self.find(queue.pop(0))
                if part.size > size:
                    head, tail = self.cut(part, [size, part.size - size])
                    queue.insert(0, tail)
                    part = head
                taken.append(part)
                size -= part.size
            segments.append(self.concat(taken) if taken else Dim(0))
        return segments

    def regroup(self, dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
        """The Dims of a reshape from `dims` to `sizes`.

        Raises:
            Misaligned: the two factorisations have no common refinement.
        """
        queue = [d for d in map(self.find, dims) if d.size != 1]
        out = []
        if 0 in sizes:
            raise Misaligned
        for size in sizes:
            taken: list[Dim] = []
            need = size
            while need > 1:
                if not queue:
                    raise Misaligned
                dim = self.find(queue.pop(0))
                if need % dim.size == 0:
                    taken.append(dim)
                    need //= dim.size
                elif dim.form is Form.PRODUCT:
                    queue[:0] = dim.parts
                elif dim.size % need == 0:
                    queue[:0] = self.split(dim, [need, dim.size // need])
                else:
                    raise Misaligned
            out.append(self.merge(taken) if size != 1 else Dim(1))
        return out

    def regroup_aligned(self, dims: Sequence[Dim], sizes: Sequence[int]) -> tuple[list[Dim], list[Dim]]:
        """As `regroup`, but where an inner run of axes does not align, only that run is given up.

        Returns:
            The Dims of the reshape, and the given-up Dims, old and new: the caller pins them.

        Raises:
            Misaligned: the tensor is empty.
        """
        if 0 in sizes:
            raise Misaligned
        out: list[Dim] = []
        lost: list[Dim] = []
        for old, new in _segments([d.size for d in dims], sizes):
            try:
                out += self.regroup(dims[old], sizes[new])
            except Misaligned:
                fresh = [Dim(s) for s in sizes[new]]
                out += fresh
                lost += [*dims[old], *fresh]
        return out, lost

    # -- saying that two are one ----------------------------------------------------------------------------------

    def unify(self, a: Dim, b: Dim) -> None:
        """Make two Dims the same, refining both where their structures differ.

        Raises:
            Misaligned: they differ in size, or have no common refinement.
        """
        a, b = self.find(a), self.find(b)
        if a is b:
            return
        if a.size != b.size:
            raise Misaligned
        if a.form is Form.LEAF:
            a.parent = b
            return
        if b.form is Form.LEAF:
            b.parent = a
            return
        if a.form is not b.form:
            concat, product = (a, b) if a.form is Form.CONCAT else (b, a)
            sizes = [p.size for p in product.parts]
            for x, y in zip(self.split(concat, sizes), tuple(product.parts), strict=True):
                self.unify(x, y)
        elif a.form is Form.PRODUCT:
            self._align(a, b, self.split)
        else:
            self._align(a, b, self.cut)
        a, b = self.find(a), self.find(b)
        if a is not b:
            a.parent = b

    def _align(self, a: Dim, b: Dim, take) -> None:
        left, right = list(a.parts), list(b.parts)
        while left and right:
            x, y = self.find(left.pop(0)), self.find(right.pop(0))
            if x.size == y.size:
                self.unify(x, y)
                continue
            (small, _), (large, rest) = ((x, left), (y, right)) if x.size < y.size else ((y, right), (x, left))
            if take == self.split:
                if large.size % small.size:
                    raise Misaligned
                tail = large.size // small.size
            else:
                tail = large.size - small.size
            head, back = take(large, [small.size, tail])
            self.unify(small, head)
            rest.insert(0, back)

    # -- reading --------------------------------------------------------------------------------------------------

    def leaves(self, dim: Dim) -> Iterator[Dim]:
        """The leaves of a Dim, in order, repeated where they occur more than once."""
        dim = self.find(dim)
        if dim.form is Form.LEAF:
            if dim.size > 1:
                yield dim
            return
        for part in dim.parts:
            yield from self.leaves(part)

    def contains(self, dim: Dim, leaf: Dim) -> bool:
        leaf = self.find(leaf)
        return any(d is leaf for d in self.leaves(dim))

    def units(self, dim: Dim, leaf: Dim) -> torch.Tensor:
        """For every index along `dim`, the unit of `leaf` that owns it, or -1.

        Returns:
            int64 tensor of shape [dim.size].

        Raises:
            Misaligned: an index would be owned twice (a product of the leaf with itself).
        """
        dim, leaf = self.find(dim), self.find(leaf)
        if dim is leaf:
            return torch.arange(dim.size)
        if dim.form is Form.LEAF:
            return torch.full((dim.size,), -1)
        if dim.form is Form.CONCAT:
            return torch.cat([self.units(p, leaf) for p in dim.parts])
        out = torch.full((1,), -1)
        for part in dim.parts:
            own = self.units(part, leaf)
            if (out >= 0).any() and (own >= 0).any():
                raise Misaligned
            out = torch.maximum(out[:, None].expand(-1, len(own)), own[None].expand(len(out), -1)).reshape(-1)
        return out

    def notes(self) -> dict[Dim, list[Note]]:
        """Notes of every leaf, those of the axes it is part of included."""
        found: dict[Dim, list[Note]] = {}
        for dim, note, _ in self._notes:
            for leaf in dict.fromkeys(self.leaves(dim)):
                notes = found.setdefault(leaf, [])
                if note not in notes:
                    notes.append(note)
        return found


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[slice, slice]]:
    """Shortest runs of two size lists with equal products, in order."""
    out, i, j, start, a, b = [], 0, 0, (0, 0), 1, 1
    while i < len(old) or j < len(new):
        if i < len(old) and (a <= b or j == len(new)):
            a, i = a * old[i], i + 1
        else:
            b, j = b * new[j], j + 1
        if a == b and ((i < len(old) and j < len(new)) or (i, j) == (len(old), len(new))):
            out.append((slice(start[0], i), slice(start[1], j)))
            start, a, b = (i, j), 1, 1
    return out
