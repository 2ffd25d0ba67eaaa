"""The view of one operation that a rule gets, the table of rules, and the two general rules: pointwise and opaque."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.anatomy.dims import Dim, Misaligned, Note
from secateur.anatomy.trace import Branch, Info, Skip
from secateur.nn.trees import tensors_in

if TYPE_CHECKING:
    from secateur.anatomy.trace import Tracer

RULES: dict[str, Callable[[Op], None]] = {}

# Elementwise in effect, though not tagged as pointwise.
_POINTWISE = {
    "_to_copy",
    "clone",
    "alias",
    "detach",
    "copy_",
    "hardswish",
    "hardswish_",
    "native_dropout",
    "contiguous",
    "lift_fresh",
    "fill_",
    "zero_",
    "masked_fill_",
    "to_mkldnn",
    "_conj",
    "log_sigmoid_forward",
    "_prelu_kernel",
    "_fused_dropout",
    "bernoulli_",
    "nan_to_num",
    "masked_fill",
}
_FACTORIES = {
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "linspace",
    "eye",
    "scalar_tensor",
    "rand",
    "randn",
    "randint",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "empty_strided",
    "tril_indices",
    "triu_indices",
    "new_empty_strided",
}


# Index values stay index values.
_SAME_VALUES = {"clone", "alias", "detach", "_to_copy", "contiguous", "clamp", "clamp_", "clamp_max", "clamp_max_"}


def rule(*names: str) -> Callable[[Callable[[Op], None]], Callable[[Op], None]]:
    """Register a rule for aten operations by name, whatever the overload."""

    def add(function: Callable[[Op], None]) -> Callable[[Op], None]:
        for name in names:
            RULES[name] = function
        return function

    return add


class Op:
    """One executed operation: its arguments by name, its results, and the ways to say what their axes are."""

    def __init__(self, tracer: Tracer, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        self.tracer, self.space, self.func = tracer, tracer.space, func
        self.name: str = func.overloadpacket.__name__
        schema = func._schema.arguments
        self.args: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
        self.args.update(zip((a.name for a in schema), args, strict=False))
        self.args.update(kwargs)
        self.tensors: list[Tensor] = list(tensors_in(list(self.args.values())))
        self.out = out
        self.outs: list[Tensor] = list(tensors_in(out))

    def first(self, *names: str) -> Any:
        """The argument under the first of these names that the operation has."""
        return next(self.args[n] for n in names if n in self.args)

    def axes(self, tensor: Tensor) -> tuple[Dim, ...]:
        return self.tracer.look(tensor).axes

    def axis(self, tensor: Tensor, index: int) -> Dim:
        return self.axes(tensor)[index]

    def unify(self, a: Dim, b: Dim) -> None:
        """Unify two Dims; where they have no common refinement, pin both."""
        try:
            self.space.unify(a, b)
        except Misaligned:
            self.pin([a, b], "opaque", f"an uneven regrouping before {self.name}")

    @property
    def coming(self) -> range:
        """The nodes that the results are about to be."""
        return range(self.tracer.nodes, self.tracer.nodes + len(self.outs))

    def pin(self, dims: Sequence[Dim], kind: str, text: str | None = None, *, if_used: bool = False) -> None:
        """Note why units along these Dims are not free; `if_used`: unless nothing ever reads the results."""
        for dim in dims:
            self.space.note(dim, Note(kind, self.tracer.where, text or self.name), self.coming if if_used else ())

    def names(self, *axes: Dim) -> None:
        self.tracer.names(axes)

    def fresh(self, sizes: Sequence[int]) -> list[Dim]:
        return [self.space.new(s) for s in sizes]

    def set(self, tensor: Tensor, axes: Sequence[Dim], *, mixes: bool = False) -> None:
        """Record the axes of a result that is computed from all tensor arguments."""
        parents = [self.tracer.look(t) for t in self.tensors]
        act = any(p.act for p in parents)
        node = self.tracer.new_node()
        past = mixed = 0
        for parent in parents:
            past |= parent.past
            mixed |= parent.past if mixes else parent.past_mixed
        roots = frozenset[str]() if act else frozenset[str]().union(*(p.roots for p in parents))
        self.tracer.info[tensor] = Info(
            tuple(axes), act=act, roots=roots, node=node, past=past | 1 << node, past_mixed=mixed
        )

    def set_view(self, tensor: Tensor, axes: Sequence[Dim], of: Tensor, branch: Branch | None = None) -> None:
        """Record the axes of a result that only rearranges `of`: it stays the same node and the same parameter."""
        self.tracer.info[tensor] = replace(self.tracer.look(of), axes=tuple(axes), branch=branch)

    def set_points(self, tensor: Tensor, axis: Dim | None) -> None:
        """Record that a result's values are indices along an axis."""
        self.tracer.info[tensor] = replace(self.tracer.info[tensor], points=axis)

    def points(self, tensor: Tensor) -> Dim | None:
        """The axis whose indices a tensor holds, if it does."""
        return self.tracer.look(tensor).points

    def looked_up(self, axis: Dim, indices: Tensor, text: str) -> None:
        """Entries of an axis are addressed by `indices`; where those point into it, an entry stays the same unit."""
        target = self.points(indices)
        if target is None or target.size != axis.size:
            self.pin([axis], "indexed", text)
        else:
            self.unify(axis, target)

    def set_branch(self, tensor: Tensor, branch: Branch | None) -> None:
        self.tracer.info[tensor] = replace(self.tracer.info[tensor], branch=branch)


def apply_rule(tracer: Tracer, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """Find and apply the rule of an operation; without one, or where axes do not align, pin what it touches."""
    op = Op(tracer, func, args, kwargs, out)
    tracer.read(op.tensors)
    if not op.outs:
        if op.tensors and op.name not in {"_assert_async", "_assert_tensor_metadata", "is_same_size", "equal"}:
            _opaque(op)
        return
    try:
        if op.name in RULES:
            RULES[op.name](op)
        elif op.name in _FACTORIES:
            _made(op)
        elif op.name in _POINTWISE or torch.Tag.pointwise in func.tags:
            pointwise(op)
        else:
            _opaque(op)
    except (Misaligned, LookupError, StopIteration, ArithmeticError):  # uneven axes, or a variant not foreseen
        if op.outs and all(t.numel() == 0 for t in op.outs):  # nothing flows through an empty tensor
            for tensor in op.outs:
                op.set(tensor, op.fresh(tensor.shape))
        else:
            _opaque(op)


def _made(op: Op) -> None:
    """A constant made by the running code: whoever merges with it depends on code that named its size."""
    for tensor in op.outs:
        axes = op.fresh(tensor.shape)
        op.pin(axes, "made", "a constant of this size")
        op.tracer.info[tensor] = Info(tuple(axes))


def _opaque(op: Op) -> None:
    for tensor in [*op.tensors]:
        op.pin(op.axes(tensor), "opaque")
    for tensor in op.outs:
        if any(tensor is t for t in op.tensors):
            continue
        axes = op.fresh(tensor.shape)
        op.pin(axes, "opaque")
        op.set(tensor, axes, mixes=True)


def broadcast(op: Op, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[Dim]:
    """Unify the axes of broadcast operands; the result has `shape`."""
    axes = []
    for back in range(len(shape), 0, -1):
        here = [op.axes(t)[-back] for t in tensors if t.dim() >= back and t.shape[-back] == shape[-back]]
        here = [d for d in here if d.size > 1]
        for other in here[1:]:
            op.unify(here[0], other)
        axes.append(here[0] if here else op.space.new(shape[-back]))
    return axes


def pointwise(op: Op) -> None:
    """Operands broadcast; the same index in, the same index out."""
    operands = [t for t in op.tensors if t.dim() > 0]
    for tensor in op.outs:
        axes = broadcast(op, operands, tensor.shape)
        branch = _branch(op, operands)
        _note_skip(op, operands, axes)
        in_place = any(tensor is t for t in op.tensors)
        points = op.points(operands[0]) if len(operands) == 1 and op.name in _SAME_VALUES else None
        op.set(tensor, axes)
        op.set_branch(tensor, branch)
        op.set_points(tensor, points)
        if len(operands) == 1 and op.name in _SAME_VALUES and op.tracer.look(operands[0]).chosen:
            op.tracer.info[tensor] = replace(op.tracer.info[tensor], chosen=op.tracer.look(operands[0]).chosen)
        if in_place and tensor._base is not None:
            _written_through(op, tensor)


def _written_through(op: Op, tensor: Tensor) -> None:
    """Writing into a view: what the view now depends on, its base depends on too."""
    base = tensor._base
    if base is not None and base in op.tracer.info:
        old, new = op.tracer.info[base], op.tracer.info[tensor]
        op.tracer.info[base] = replace(
            old,
            act=old.act or new.act,
            node=new.node,
            past=old.past | new.past,
            past_mixed=old.past_mixed | new.past_mixed,
            roots=old.roots | new.roots,
        )


def _branch(op: Op, operands: list[Tensor]) -> Branch | None:
    """A contraction's output stays one through identity-like operations and multiplication by a parameter."""
    carriers = [t for t in operands if op.tracer.look(t).branch is not None]
    if len(carriers) != 1:
        return None
    branch = op.tracer.look(carriers[0]).branch
    if op.name in {"clone", "alias", "detach", "native_dropout", "_to_copy"} and len(operands) == 1:
        return branch
    others = [op.tracer.look(t) for t in operands if t is not carriers[0]]
    if op.name in {"mul", "mul_"} and len(others) == 1 and others[0].name in op.tracer.parameters and branch:
        return replace(branch, scales=(*branch.scales, others[0].name))
    return None


def _note_skip(op: Op, operands: list[Tensor], axes: list[Dim]) -> None:
    if op.name not in {"add", "add_"} or len(operands) != 2:
        return
    a, b = (op.tracer.look(t) for t in operands)
    if not (a.act and b.act) or a.node == b.node:
        return
    for stream, other in ((a, b), (b, a)):
        if other.past_mixed >> stream.node & 1:
            op.pin(axes, "skip", "a residual connection")
            node = op.tracer.nodes  # the number that `set` is about to give
            op.tracer.trace.skips.append(Skip(node, tuple(axes)))
            if other.branch is not None and other.branch.order is not None:
                event = op.tracer.trace.contractions[other.branch.event]
                event.residual, event.branch = len(op.tracer.trace.skips) - 1, other.branch
            return
