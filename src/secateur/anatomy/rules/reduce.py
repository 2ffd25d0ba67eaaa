"""Operations that mix the indices of an axis without weights: reductions, softmax, norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.anatomy.dims import Dim, Misaligned
from secateur.anatomy.rules.base import Op, rule


def _dims(value: int | Sequence[int] | None, n: int) -> list[int]:
    if value is None or (not isinstance(value, int) and len(value) == 0):
        return list(range(n))
    return [d % n for d in ([value] if isinstance(value, int) else value)] if n else []


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "prod",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "linalg_vector_norm",
    "norm",
    "logsumexp",
    "argmax",
    "argmin",
    "any",
    "all",
    "nansum",
    "aminmax",
    "median",
    "count_nonzero",
    "mode",
    "special_logsumexp",
)
def reduce(op: Op) -> None:
    source = op.first("self", "input")
    before = op.axes(source)
    if len(op.tensors) > 1:
        raise Misaligned  # max(a, b) of tensors is pointwise and tagged so; anything else here is unknown
    gone = _dims(op.args.get("dim"), len(before))
    op.pin([before[d] for d in gone], "reduce", if_used=True)
    for out in op.outs:
        if op.args.get("keepdim") and out.dim() == len(before):
            axes = [op.space.new(1) if i in gone else d for i, d in enumerate(before)]
        else:
            axes = [d for i, d in enumerate(before) if i not in gone]
        op.set(out, axes)
        if _holds_indices(out, source) and len(gone) == 1:
            _picked(op, out, before[gone[0]], 1)


@rule(
    "_softmax",
    "_safe_softmax",
    "softmax",
    "_log_softmax",
    "log_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "sort",
    "cummax",
    "cummin",
    "_fft_r2c",
    "_fft_c2c",
    "_fft_c2r",
    "glu",
)
def along(op: Op) -> None:
    """The axis keeps its size but its indices depend on one another."""
    source = op.args["self"]
    axes = list(op.axes(source))
    for d in _dims(op.args.get("dim"), len(axes)):
        op.pin([axes[d]], "softmax" if "softmax" in op.name else "reduce")
        if axes[d].size != op.outs[0].shape[d]:
            axes[d] = op.space.new(op.outs[0].shape[d])
            op.pin([axes[d]], "reduce")
    for out in op.outs:
        op.set(out, axes)
    if op.name == "sort":
        op.set_points(op.outs[0], op.points(source))
        op.set_points(op.outs[1], op.axis(source, op.args["dim"]))


@rule("topk", "kthvalue")
def topk(op: Op) -> None:
    source = op.args["self"]
    axes = list(op.axes(source))
    d = op.args["dim"]
    whole = axes[d]
    op.pin([whole], "reduce")
    axes[d] = op.space.new(op.outs[0].shape[d])
    for out in op.outs:
        op.set(out, axes)
    _picked(op, op.outs[1], whole, axes[d].size)


def _holds_indices(out: Tensor, source: Tensor) -> bool:
    return source.is_floating_point() and out.dtype == torch.int64


def _picked(op: Op, indices: Tensor, axis: Dim, count: int) -> None:
    op.set_points(indices, axis)
    op.tracer.trace.picks.append((axis, count))


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(op: Op) -> None:
    source = op.args["input"]
    axes = op.axes(source)
    normalized = axes[len(axes) - len(op.args["normalized_shape"]) :]
    op.pin(normalized, "norm", "a norm over it")
    for name in ("weight", "bias"):
        if op.args.get(name) is not None:
            for a, b in zip(op.axes(op.args[name]), normalized, strict=True):
                op.unify(a, b)
    op.set(op.outs[0], axes)
    for out in op.outs[1:]:
        op.set(out, _ones_after(op, axes, out.dim(), len(normalized)))


def _ones_after(op: Op, axes: Sequence[Dim], n: int, normalized: int) -> list[Dim]:
    kept = list(axes[: len(axes) - normalized])
    return kept + op.fresh([1] * (n - len(kept)))


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "batch_norm",
    "_batch_norm_impl_index",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "miopen_batch_norm",
)
def batch_norm(op: Op) -> None:
    source = op.args["input"]
    axes = op.axes(source)
    training = op.args.get("training") or op.args.get("train")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if op.args.get(name) is not None:
            op.unify(op.axis(op.args[name], 0), axes[1])
    if training:
        what = "batch statistics" if op.tracer.look(source).act else "weight standardisation"
        op.pin([d for i, d in enumerate(axes) if i != 1], "reduce", what)
    op.set(op.outs[0], axes)
    for out in op.outs[1:]:
        op.set(out, [axes[1]] if tuple(out.shape) == (axes[1].size,) else op.fresh(out.shape))


@rule("native_group_norm", "group_norm")
def group_norm(op: Op) -> None:
    source, groups = op.args["input"], op.first("group", "num_groups")
    axes = op.axes(source)
    for name in ("weight", "bias"):
        if op.args.get(name) is not None:
            op.unify(op.axis(op.args[name], 0), axes[1])
    inner = axes[1].size // groups
    if inner > 1:
        try:
            op.pin([op.space.split(axes[1], [groups, inner])[1]], "norm", "a group norm over it")
        except Misaligned:
            op.pin([axes[1]], "norm", "a group norm over it")
    op.set(op.outs[0], axes)
    for out in op.outs[1:]:
        op.set(out, op.fresh(out.shape))
