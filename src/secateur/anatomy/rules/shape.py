"""Operations that rearrange: reshape, permute, slice, concatenate."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from secateur.anatomy.dims import Misaligned
from secateur.anatomy.rules.base import Op, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "resize_", "view_copy")
def view(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    before = op.axes(source)
    axes, lost = op.space.regroup_aligned(before, out.shape)
    op.pin(lost, "opaque", "an uneven reshape")
    op.names(*before, *axes)
    branch = op.tracer.look(source).branch
    if branch is not None and branch.order is not None and source.shape != out.shape:
        branch = None
    op.set_view(out, axes, source, branch)


@rule("permute", "transpose", "t", "movedim", "transpose_", "swapaxes", "numpy_T", "permute_copy", "transpose_copy")
def permute(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    n = source.dim()
    if "dims" in op.args:
        order = [d % n for d in op.args["dims"]]
    elif op.name == "t":
        order = list(range(n))[::-1]
    else:
        order = list(range(n))
        a, b = op.args["dim0"] % n, op.args["dim1"] % n
        order[a], order[b] = order[b], order[a]
    info = op.tracer.look(source)
    branch = info.branch
    if branch is not None and branch.order is not None:
        branch = replace(branch, order=tuple(branch.order[i] for i in order))
    op.set_view(out, [info.axes[i] for i in order], source, branch)


@rule("unsqueeze", "unsqueeze_", "squeeze", "squeeze_", "unsqueeze_copy")
def squeeze(op: Op) -> None:
    """Only axes of size 1 come or go."""
    source, out = op.args["self"], op.outs[0]
    op.set_view(out, op.space.regroup([d for d in op.axes(source) if d.size != 1], out.shape), source)


@rule("alias", "detach")
def alias(op: Op) -> None:
    """The same tensor again (`x[:, 0:]`)."""
    source = op.args["self"]
    op.set_view(op.outs[0], op.axes(source), source, op.tracer.look(source).branch)


@rule("view_as_complex", "view_as_complex_copy")
def view_as_complex(op: Op) -> None:
    """Pairs of numbers become one: rotary embeddings."""
    source = op.args["self"]
    *axes, pair = op.axes(source)
    op.pin([pair], "indexed", "a pair of real and imaginary part")
    op.set_view(op.outs[0], axes, source)


@rule("view_as_real", "view_as_real_copy")
def view_as_real(op: Op) -> None:
    source = op.args["self"]
    pair = op.space.new(2)
    op.pin([pair], "indexed", "a pair of real and imaginary part")
    op.set_view(op.outs[0], [*op.axes(source), pair], source)


@rule("expand", "expand_copy")
def expand(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    before = op.axes(source)
    lead = out.dim() - len(before)
    axes = op.fresh(out.shape[:lead])
    axes += [d if d.size == s else op.space.new(s) for d, s in zip(before, out.shape[lead:], strict=True)]
    op.names(*axes)
    op.set_view(out, axes, source)


@rule("repeat")
def repeat(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    before, repeats = op.axes(source), op.args["repeats"]
    before = (*op.fresh([1] * (len(repeats) - len(before))), *before)
    axes = [d if r == 1 else op.space.merge([op.space.new(r), d]) for d, r in zip(before, repeats, strict=True)]
    op.names(*axes)
    op.set(out, axes)


@rule("repeat_interleave")
def repeat_interleave(op: Op) -> None:
    source, out, dim, repeats = op.args["self"], op.outs[0], op.args.get("dim"), op.args.get("repeats")
    if dim is None or not isinstance(repeats, int):
        raise Misaligned
    axes = list(op.axes(source))
    axes[dim] = op.space.merge([axes[dim], op.space.new(repeats)])
    op.names(axes[dim])
    op.set(out, axes)


@rule("select", "select_copy")
def select(op: Op) -> None:
    """One index of an axis is taken: that axis can no longer be shortened."""
    source, out = op.args["self"], op.outs[0]
    axes = list(op.axes(source))
    op.pin([axes.pop(op.args["dim"])], "indexed", "picking one index")
    op.set_view(out, axes, source)


@rule("unbind", "unbind_copy")
def unbind(op: Op) -> None:
    source = op.args["self"]
    axes = list(op.axes(source))
    op.pin([axes.pop(op.args["dim"])], "indexed", "unbind")
    for out in op.outs:
        op.set_view(out, axes, source)


@rule("slice", "slice_copy")
def slice_(op: Op) -> None:
    source, out, dim = op.args["self"], op.outs[0], op.args["dim"]
    axes = list(op.axes(source))
    whole = axes[dim]
    size, step = whole.size, op.args["step"]
    start = _clamp(op.args["start"], 0, size)
    if out.shape[dim] == size:
        op.set_view(out, axes, source, op.tracer.look(source).branch)
        return
    try:
        if step == 1:
            length = out.shape[dim]
            axes[dim] = op.space.cut(whole, [start, length, size - start - length])[1]
        elif size % step == 0 and out.shape[dim] == size // step:
            axes[dim], offset = op.space.split(whole, [size // step, step])
            op.pin([offset], "indexed", "a strided slice")
        else:
            raise Misaligned
    except Misaligned:
        op.pin([whole], "opaque", "a slice through the middle of a group")
        axes[dim] = op.space.new(out.shape[dim])
        op.pin([axes[dim]], "opaque", "a slice through the middle of a group")
    op.names(axes[dim])
    op.set_view(out, axes, source)


def _clamp(value: int | None, default: int, size: int) -> int:
    if value is None:
        return default
    return min(max(value + size if value < 0 else value, 0), size)


@rule(
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "chunk",
    "unsafe_chunk",
    "tensor_split",
    "split_copy",
    "split_with_sizes_copy",
)
def split(op: Op) -> None:
    source, dim = op.args["self"], op.args["dim"]
    whole = op.axis(source, dim)
    sizes = [t.shape[dim] for t in op.outs]
    try:
        parts = op.space.cut(whole, sizes)
    except Misaligned:
        op.pin([whole], "opaque", "a split through the middle of a group")
        parts = op.fresh(sizes)
        op.pin(parts, "opaque", "a split through the middle of a group")
    op.names(*parts)
    for out, part in zip(op.outs, parts, strict=True):
        axes = list(op.axes(source))
        axes[dim] = part
        op.set_view(out, axes, source)


@rule("cat", "concat")
def cat(op: Op) -> None:
    out = op.outs[0]
    tensors: list[Tensor] = [t for t in op.args["tensors"] if t.numel() or t.dim() > 1]
    dim = op.args["dim"] % out.dim()
    axes = []
    for i in range(out.dim()):
        here = [op.axis(t, i) for t in tensors]
        if i == dim:
            axes.append(op.space.concat(here))
            continue
        for other in here[1:]:
            op.unify(here[0], other)
        axes.append(here[0])
    op.set(out, axes)
    targets = [op.space.find(t) for t in map(op.points, tensors) if t is not None]
    if len(targets) == len(tensors) and len(set(targets)) == 1:
        op.set_points(out, targets[0])
        op.tracer.trace.picks.append((targets[0], out.shape[dim]))


@rule("stack")
def stack(op: Op) -> None:
    out, tensors = op.outs[0], op.args["tensors"]
    axes = list(op.axes(tensors[0]))
    for tensor in tensors[1:]:
        for a, b in zip(axes, op.axes(tensor), strict=True):
            op.unify(a, b)
    new = op.space.new(len(tensors))
    op.pin([new], "indexed", "stack")
    axes.insert(op.args["dim"] % out.dim(), new)
    op.set(out, axes)


@rule("roll", "flip")
def roll(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    dims = op.args["dims"]
    axes = op.axes(source)
    op.pin([axes[d] for d in ([dims] if isinstance(dims, int) else dims)] or axes, "indexed")
    op.set(out, axes)


@rule("as_strided", "as_strided_", "as_strided_copy")
def as_strided(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    if source.shape != out.shape:
        raise Misaligned
    op.set_view(out, op.axes(source), source)


@rule("unfold")
def unfold(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    axes = list(op.axes(source))
    dim = op.args["dimension"]
    op.pin([axes[dim]], "indexed")
    axes[dim] = op.space.new(out.shape[dim])
    op.set(out, [*axes, op.space.new(out.shape[-1])])
