"""Contractions: matrix products and convolutions, with their cost."""

from __future__ import annotations

import math

from torch import Tensor

from secateur.anatomy.dims import Dim, Misaligned
from secateur.anatomy.rules.base import Op, broadcast, rule
from secateur.anatomy.trace import Branch, Contraction


def _weights(op: Op, x: Tensor, w: Tensor) -> tuple[frozenset[str], bool]:
    """Names on the weight side, and whether that side is `x`."""
    a, b = op.tracer.look(x), op.tracer.look(w)
    known = op.tracer.parameters
    if a.chosen != b.chosen and not (a.chosen and b.chosen):
        return frozenset({a.chosen or b.chosen or ""}), b.chosen is None
    if not b.act and (b.name in known or (b.roots and (a.act or not a.roots))):
        return b.roots, False
    if not a.act and (a.name in known or a.roots):
        return a.roots, True
    return frozenset(), False


def _contract(
    op: Op,
    out: Tensor,
    axes: list[Dim],
    x: Tensor,
    w: Tensor,
    summed: tuple[Dim, Dim],
    rows: Dim,
    columns: Dim,
    batch: Dim,
) -> None:
    """Record out[.., rows, columns] = sum over `summed` of x[.., rows, s] * w[.., s, columns]."""
    op.unify(*summed)
    weights, flipped = _weights(op, x, w)
    op.tracer.trace.contractions.append(
        Contraction(
            module=op.tracer.where,
            weights=weights,
            summed=summed[0],
            features=rows if flipped else columns,
            batch=batch,
            inputs=summed[0],
            macs=math.prod(out.shape) * summed[0].size,
            dims=(batch, rows, columns, summed[0]),
        )
    )
    op.set(out, axes, mixes=True)
    op.set_branch(out, Branch(len(op.tracer.trace.contractions) - 1))


@rule("mm", "addmm", "mv", "addmv", "linear")
def mm(op: Op) -> None:
    out = op.outs[0]
    if op.name == "linear":
        x, w = op.args["input"], op.args["weight"]
        k, n = op.axis(w, 1), op.axis(w, 0)
        bias = op.args.get("bias")
    else:
        x, w = (op.args["mat1"], op.args["mat2"]) if op.name == "addmm" else (op.args["self"], op.args.get("mat2"))
        if w is None or w.dim() != 2:
            raise Misaligned
        k, n = op.axis(w, 0), op.axis(w, 1)
        bias = op.args["self"] if op.name == "addmm" else None
    rows = op.space.merge(op.axes(x)[:-1])
    _contract(op, out, [*op.axes(x)[:-1], n], x, w, (op.axis(x, -1), k), rows, n, op.space.new(1))
    if bias is not None and bias.dim():
        for dim, axis in zip(reversed(op.axes(bias)), [n, *reversed(op.axes(x)[:-1])], strict=False):
            if dim.size > 1:
                op.unify(dim, axis)


@rule("bmm", "baddbmm")
def bmm(op: Op) -> None:
    out = op.outs[0]
    a, b = (op.args["self"], op.args["mat2"]) if op.name == "bmm" else (op.args["batch1"], op.args["batch2"])
    (batch, rows, k), (batch2, k2, columns) = op.axes(a), op.axes(b)
    op.unify(batch, batch2)
    _contract(op, out, [batch, rows, columns], a, b, (k, k2), rows, columns, batch)
    if op.name == "baddbmm":
        broadcast(op, [op.args["self"], out], out.shape)


@rule("linalg_solve_triangular")
def solve_triangular(op: Op) -> None:
    """X of A X = B or X A = B: the rows and columns of A depend on one another, the other axes are those of B."""
    a, b, left = op.args["self"], op.args["B"], op.args.get("left", True)
    square = op.axes(a)[-2:]
    op.pin(square, "reduce", "a triangular solve")
    op.unify(square[0] if left else square[1], op.axis(b, -2 if left else -1))
    for one, other in zip(op.axes(a)[:-2], op.axes(b)[:-2], strict=True):
        if one.size == other.size:
            op.unify(one, other)
    op.set(op.outs[0], op.axes(b), mixes=True)


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_mm(op: Op) -> None:
    """Rows of x, sorted by expert, times that expert's matrix: [S, K] x [E, K, N] -> [S, N]."""
    out = op.outs[0]
    x, w, offsets = op.first("self", "input"), op.first("mat2", "weight"), op.args.get("offs")
    if x.dim() != 2 or w.dim() != 3 or offsets is None:
        raise Misaligned
    rows, k = op.axes(x)
    experts, k2, columns = op.axes(w)
    op.unify(experts, op.axis(offsets, 0))
    op.names(experts, k2, columns)  # the kernel wants aligned rows
    _contract(op, out, [rows, columns], x, w, (k, k2), rows, columns, op.space.new(1))


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(op: Op) -> None:
    out, x, w, groups = op.outs[0], op.first("input", "self"), op.args["weight"], op.args["groups"]
    channels = op.axis(x, 1)
    first, second = op.axes(w)[:2]
    transposed = bool(op.args.get("transposed", False))
    inside, outside = (first, second) if transposed else (second, first)
    g = op.space.new(groups)
    if transposed:
        g, inside = op.space.split(first, [groups, first.size // groups])
    elif groups > 1:
        g, outside = op.space.split(first, [groups, first.size // groups])
    op.unify(channels, op.space.merge([g, inside]))
    if groups > 1:
        op.names(g)
    features = op.space.merge([g, outside])
    space = op.fresh(out.shape[2:])
    op.tracer.trace.contractions.append(
        Contraction(
            module=op.tracer.where,
            weights=_weights(op, x, w)[0],
            summed=inside,
            features=features,
            batch=g,
            inputs=channels,
            macs=math.prod(out.shape) * inside.size * math.prod(w.shape[2:]),
            dims=(op.axis(x, 0), g, outside, inside),
            dense=inside.size > 1 or groups == 1,
            spatial=math.prod(w.shape[2:]) > 1,
        )
    )
    op.set(out, [op.axis(x, 0), features, *space], mixes=inside.size > 1 or groups == 1)
    op.set_branch(out, Branch(len(op.tracer.trace.contractions) - 1))
    bias = op.args.get("bias")
    if bias is not None:
        op.unify(op.axis(bias, 0), features)
