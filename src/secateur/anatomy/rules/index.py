"""Look-ups: embeddings, relative-position tables, gathers."""

from __future__ import annotations

from secateur.anatomy.rules.base import Op, broadcast, rule


@rule("embedding", "embedding_renorm_")
def embedding(op: Op) -> None:
    weight, indices = op.args["weight"], op.args["indices"]
    rows, width = op.axes(weight)
    op.pin([rows], "indexed", "a look-up table")
    op.set(op.outs[0], [*op.axes(indices), width])


@rule("index", "_unsafe_index")
def index(op: Op) -> None:
    """Indexed axes are replaced by those of the indices; the others stay."""
    source, out = op.args["self"], op.outs[0]
    before, indices = op.axes(source), op.args["indices"]
    used = [i for i, t in enumerate(indices) if t is not None]
    op.pin([before[i] for i in used], "indexed", "a look-up table")
    bools = any(indices[i].dtype.is_floating_point is False and str(indices[i].dtype) == "torch.bool" for i in used)
    contiguous = used == list(range(used[0], used[-1] + 1)) if used else True
    kept = [d for i, d in enumerate(before) if i not in used]
    new_count = out.dim() - len(kept)
    at = used[0] if used and contiguous else 0
    shape = list(out.shape[at : at + new_count])
    new = op.fresh(shape) if bools else broadcast(op, [indices[i] for i in used], shape)
    op.set(out, [*kept[:at], *new, *kept[at:]])


@rule("index_select")
def index_select(op: Op) -> None:
    axes = list(op.axes(op.args["self"]))
    d = op.args["dim"]
    op.pin([axes[d]], "indexed", "a look-up table")
    axes[d] = op.axis(op.args["index"], 0) if op.args["index"].dim() else op.space.new(1)
    op.set(op.outs[0], axes)


@rule("gather", "take_along_dim")
def gather(op: Op) -> None:
    source, where, out = op.args["self"], op.args["index"], op.outs[0]
    d = op.args["dim"] % out.dim()
    axes = []
    for i, (a, b) in enumerate(zip(op.axes(source), op.axes(where), strict=True)):
        if i == d or a.size != b.size:
            op.pin([a], "indexed", "a gather")
        else:
            op.unify(a, b)
        axes.append(b)
    op.set(out, axes)


@rule("index_put", "index_put_", "_unsafe_index_put")
def index_put(op: Op) -> None:
    source, indices, out = op.args["self"], op.args["indices"], op.outs[0]
    axes = op.axes(source)
    used = [i for i, t in enumerate(indices) if t is not None]
    op.pin([axes[i] for i in used], "indexed", "an indexed write")
    values = op.axes(op.args["values"])
    kept = [d for i, d in enumerate(axes) if i not in used and i > max(used, default=-1)]
    for a, b in zip(reversed(kept), reversed(values), strict=False):
        if b.size > 1 and a.size == b.size:
            op.unify(a, b)
    op.set(out, axes)
