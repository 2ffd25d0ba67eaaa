"""Pooling, resizing, padding and patches: the leading axes stay, the spatial ones are new."""

from __future__ import annotations

from secateur.anatomy.dims import Misaligned
from secateur.anatomy.rules.base import Op, rule

_TRAILING = {"1d": 1, "2d": 2, "3d": 3}


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "mkldnn_adaptive_avg_pool2d",
    "max_pool2d",
    "mkldnn_max_pool2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact2d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def spatial(op: Op) -> None:
    source = op.first("self", "input")
    count = next(n for mark, n in _TRAILING.items() if mark in op.name)
    axes = op.axes(source)
    for out in op.outs:
        op.set(out, [*axes[: len(axes) - count], *op.fresh(out.shape[-count:])])


@rule("grid_sampler_2d", "grid_sampler_3d", "grid_sampler")
def grid_sampler(op: Op) -> None:
    source, out = op.args["input"], op.outs[0]
    grid = op.axes(op.args["grid"])
    op.unify(op.axis(source, 0), grid[0])
    op.pin([grid[-1]], "indexed", "a sampling grid")
    op.pin(op.axes(source)[2:], "indexed", "a sampling grid")
    op.set(out, [*op.axes(source)[:2], *grid[1:-1]])


@rule("constant_pad_nd")
def constant_pad(op: Op) -> None:
    source, out, pads = op.args["self"], op.outs[0], op.args["pad"]
    axes = list(op.axes(source))
    for i in range(len(pads) // 2):
        d = len(axes) - 1 - i
        before, after = pads[2 * i], pads[2 * i + 1]
        if before < 0 or after < 0:
            axes[d] = op.space.cut(
                axes[d], [max(-before, 0), axes[d].size + min(before, 0) + min(after, 0), max(-after, 0)]
            )[1]
        axes[d] = op.space.concat([*op.fresh([max(before, 0)]), axes[d], *op.fresh([max(after, 0)])])
        if axes[d].size != out.shape[d]:
            raise Misaligned
    op.set(out, axes)


@rule("im2col")
def im2col(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    axes = op.axes(source)
    channels = axes[-3]
    patch = op.space.merge([channels, op.space.new(out.shape[-2] // channels.size)])
    op.set(out, [*axes[:-3], patch, op.space.new(out.shape[-1])])


@rule("col2im")
def col2im(op: Op) -> None:
    source, out = op.args["self"], op.outs[0]
    axes = op.axes(source)
    channels, _ = op.space.split(axes[-2], [out.shape[-3], axes[-2].size // out.shape[-3]])
    op.set(out, [*axes[:-2], channels, *op.fresh(out.shape[-2:])])


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def shuffle(op: Op) -> None:
    raise Misaligned
