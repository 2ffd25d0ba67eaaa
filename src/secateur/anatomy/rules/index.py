"""Look-ups: embeddings, relative-position tables, gathers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from secateur.anatomy.dims import Dim, Misaligned
from secateur.anatomy.rules.base import Op, broadcast, rule


@rule("embedding", "embedding_renorm_")
def embedding(op: Op) -> None:
    weight, indices = op.args["weight"], op.args["indices"]
    rows, width = op.axes(weight)
    op.looked_up(rows, indices, "a look-up table")
    op.set(op.outs[0], [*op.axes(indices), width])


@rule("index", "_unsafe_index")
def index(op: Op) -> None:
    """Indexed axes are replaced by those of the indices; the others stay."""
    source, out = op.args["self"], op.outs[0]
    before, indices = op.axes(source), op.args["indices"]
    used = [i for i, t in enumerate(indices) if t is not None]
    if len(used) == 1 and _run(op, before[used[0]], indices[used[0]]) is not None:
        _segment(op, source, out, used[0], indices[used[0]])
        return
    for i in used:
        op.looked_up(before[i], indices[i], "a look-up table")
    bools = any(indices[i].dtype.is_floating_point is False and str(indices[i].dtype) == "torch.bool" for i in used)
    contiguous = used == list(range(used[0], used[-1] + 1)) if used else True
    kept = [d for i, d in enumerate(before) if i not in used]
    new_count = out.dim() - len(kept)
    at = used[0] if used and contiguous else 0
    shape = list(out.shape[at : at + new_count])
    new = op.fresh(shape) if bools else broadcast(op, [indices[i] for i in used], shape)
    op.set(out, [*kept[:at], *new, *kept[at:]])
    op.set_points(out, op.points(source))
    name = op.tracer.look(source).name
    if name in op.tracer.parameters and len(kept) > 1:
        op.tracer.info[out] = replace(op.tracer.info[out], chosen=name)


def _run(op: Op, axis: Dim, indices: Tensor) -> list[int] | None:
    """Indices that are a constant run of neighbours (`x[..., [-1], :]`), short of the whole axis; None for others."""
    constant = (
        not op.tracer.look(indices).act and op.tracer.look(indices).name is None and indices.device.type != "meta"
    )
    if not constant or indices.dim() != 1 or indices.dtype != torch.int64 or not 0 < len(indices) < axis.size:
        return None
    first = int(indices[0]) % axis.size
    run = list(range(first, first + len(indices)))
    return run if [int(i) % axis.size for i in indices] == run else None


def _segment(op: Op, source: Tensor, out: Tensor, d: int, indices: Tensor) -> None:
    axes = list(op.axes(source))
    run = _run(op, axes[d], indices) or []
    axes[d] = op.space.cut(axes[d], [run[0], len(run), axes[d].size - run[0] - len(run)])[1]
    op.names(axes[d])
    op.set(out, axes)


@rule("index_select")
def index_select(op: Op) -> None:
    axes = list(op.axes(op.args["self"]))
    d = op.args["dim"]
    op.looked_up(axes[d], op.args["index"], "a look-up table")
    axes[d] = op.axis(op.args["index"], 0) if op.args["index"].dim() else op.space.new(1)
    op.set(op.outs[0], axes)


@rule("gather", "take_along_dim")
def gather(op: Op) -> None:
    source, where, out = op.args["self"], op.args["index"], op.outs[0]
    d = op.args["dim"] % out.dim()
    axes = []
    for i, (a, b) in enumerate(zip(op.axes(source), op.axes(where), strict=True)):
        if i == d:
            op.looked_up(a, where, "a gather")
        elif a.size != b.size:
            op.pin([a], "indexed", "a gather")
        else:
            op.unify(a, b)
        axes.append(b)
    op.set(out, axes)
    op.set_points(out, op.points(source))


@rule("scatter", "scatter_", "scatter_add", "scatter_add_")
def scatter(op: Op) -> None:
    source, where, out = op.args["self"], op.args["index"], op.outs[0]
    if not where.dim():
        raise Misaligned
    axes, d = op.axes(source), op.args["dim"] % out.dim()
    values = op.args.get("src")
    for i, axis in enumerate(axes):
        sides = [t for t in (where, values) if t is not None]
        if i == d:
            op.looked_up(axis, where, "an indexed write")
        for tensor in sides if i != d else ():
            if tensor.shape[i] == axis.size:
                op.unify(axis, op.axis(tensor, i))
            else:
                op.pin([axis], "indexed", "an indexed write")
    op.names(axes[d])
    op.set(out, axes)


@rule("index_add", "index_add_", "index_copy", "index_copy_")
def index_add(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    axes, values, d = op.axes(source), op.axes(op.args["source"]), op.args["dim"] % out.dim()
    op.looked_up(axes[d], op.args["index"], "an indexed write")
    for i, (a, b) in enumerate(zip(axes, values, strict=True)):
        if i != d:
            op.unify(a, b)
    op.set(out, axes, mixes=True)


@rule("histc", "bincount")
def histogram(op: Op) -> None:
    """Counts of index values: one count for every index of the axis pointed into."""
    source, out = op.args["self"], op.outs[0]
    target = op.points(source)
    whole = op.name == "bincount" or (op.args["min"] == 0 and op.args["max"] == op.args["bins"] - 1)
    if target is None or not whole or out.shape[0] != target.size:
        raise Misaligned
    op.names(target)
    op.set(out, [target])


@rule("index_put", "index_put_", "_unsafe_index_put")
def index_put(op: Op) -> None:
    source, indices, out = op.args["self"], op.args["indices"], op.outs[0]
    axes = op.axes(source)
    used = [i for i, t in enumerate(indices) if t is not None]
    for i in used:
        op.looked_up(axes[i], indices[i], "an indexed write")
    values = op.axes(op.args["values"])
    kept = [d for i, d in enumerate(axes) if i not in used and i > max(used, default=-1)]
    for a, b in zip(reversed(kept), reversed(values), strict=False):
        if b.size > 1 and a.size == b.size:
            op.unify(a, b)
    op.set(out, axes)
