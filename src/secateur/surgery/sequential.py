"""Refitting a cut model front to back, each layer on what the layers before it now really deliver.

A layer that writes into the residual stream gives S = R + L * (W h + b), with R the stream before it and L a LayerScale
(or 1). In the cut model R and h differ from the dense ones, so W and b are refit by regression of
    y* = y + (S_dense - S_cut) / L
on the cut model's own h: the layer makes up for what was lost before it, not only for its own units. Layers that do not
write into the stream are refit to the dense model's output of that layer. Positions count by how much an error there
moves the model's features (`LayerSums.position_weights`).

The regression is pulled towards the weight it starts from (the affine fold) by a ridge, for each layer the one under
which each half of the images predicts the other best. Blocks already passed are answered from disk
(`secateur.replay`), so each block runs about four times in all, whatever the depth.

Shapes: B images, P positions, N inputs of a layer, D outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Consumer
from secateur.calibration.collect import as_output, rows, scale_of
from secateur.calibration.statistics import Statistics
from secateur.data import Batches
from secateur.linalg import damped_cholesky
from secateur.models import forward
from secateur.nn.attention import explicit_attention
from secateur.nn.params import owner_of
from secateur.nn.weightless import known_values
from secateur.progress import track
from secateur.replay import Prefix, Spool, Stop, grabbed
from secateur.surgery.cut import check_plan, plan_of, tensor_masks
from secateur.surgery.layer import add_to_bias_, kernel_positions, read_weight, write_weight_

# Relative to the inputs' mean square, strongest first. The start was fitted on both halves, so that either half finds
# it better than it is: beyond 0.3 cross-validation would rather not move at all, and the features get worse.
RIDGES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


@dataclass
class Target:
    """A layer to refit.

    Attributes:
        consumer: in the dense model.
        stage: blocks that are finished before it runs.
        inside: its residual point lies in the same stage.
        outputs: bool [D], the dense layer's outputs that the cut layer still has; None for all.
    """

    consumer: Consumer
    stage: int
    inside: bool
    outputs: Tensor | None = None


@torch.no_grad()
def refit_(
    small: nn.Module,
    dense: nn.Module,
    anatomy: Anatomy,
    data: Batches,
    *,
    statistics: Statistics | None = None,
    power: float = 0.5,
    add_bias: bool = True,
    absent: tuple[str, ...] = (),
) -> list[str]:
    """Refit, in place and in order of execution, every layer of a cut model that can be.

    Args:
        small: the cut model.
        dense: the model it was cut from.
        anatomy: of the dense model.
        data: images, read several times.
        statistics: of the dense model, for the weights of positions.
        power: exponent of the gradient energy in a position's weight.
        add_bias: give layers without a bias one.
        absent: paths of blocks that stand aside in the cut model.

    Returns:
        Names of biases that were added.
    """
    lost = tuple(f"{path}." for path in absent)
    with explicit_attention(dense), explicit_attention(small):
        first = next(iter(data))
        prefixes = {"dense": Prefix(dense, anatomy.blocks, forward), "cut": Prefix(small, anatomy.blocks, forward)}
        checked = [prefix.check(first) for prefix in prefixes.values()]
        for prefix in prefixes.values():
            prefix.sound = all(checked)
        runner = _Runner(prefixes, Spool(), data)
        plan = plan_of(small)
        masks = {} if plan is None else tensor_masks(check_plan(dense, plan, anatomy))
        targets = [
            replace(t, outputs=masks.get(t.consumer.weight, {}).get(1 - t.consumer.axis))
            for t in targets_of(dense, anatomy, first)
            if not t.consumer.module.startswith(lost)
        ]
        stages = sorted({t.stage for t in targets})
        added: list[str] = []
        for stage in track(range(max(stages, default=-1) + 1), "Refitting blocks"):
            here = [t for t in targets if t.stage == stage]
            runner.keep_dense(stage, here)
            for target in here:
                added += refit_layer(small, target, runner, statistics, power, add_bias)
            runner.advance("cut", stage)
        return added


def targets_of(dense: nn.Module, anatomy: Anatomy, batch: Any) -> list[Target]:
    """Layers that can be refit (linear or 1x1), in order of execution, with the stage at which each runs."""
    layers = {c.module: c for g in anatomy.cuttable.values() for c in g.consumers}
    layers = {p: c for p, c in layers.items() if kernel_positions(dense, c) == 1}
    watched = set(layers) | {c.residual.module for c in layers.values() if c.residual} | set(anatomy.blocks)
    sequence: list[tuple[str, str]] = []
    handles = []
    for path in watched:
        module = dense.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda _m, _a, p=path: sequence.append((p, "in"))))
        handles.append(module.register_forward_hook(lambda _m, _a, _o, p=path: sequence.append((p, "out"))))
    try:
        with known_values(dense):
            forward(dense, batch)
    finally:
        for handle in handles:
            handle.remove()
    done = 0
    finished: dict[tuple[str, str], int] = {}
    for event in sequence:
        finished.setdefault(event, done)
        done += event in {(b, "out") for b in anatomy.blocks}
    out = []
    for event in dict.fromkeys(sequence):
        path, side = event
        if path in layers and side == "in":
            residual = layers[path].residual
            inside = residual is not None and finished.get((residual.module, residual.side)) == finished[event]
            out.append(Target(layers[path], finished[event], inside))
    return out


class Runner(Protocol):
    """What a refit needs of whatever runs the models."""

    spool: Spool

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """Index of every batch, and the batch, or anything whose first axis is as long."""

    def run(
        self, which: str, stage: int, index: int, batch: Tensor, points: list[tuple], *, keep: bool
    ) -> list[Tensor]:
        """What a model ("dense" or "cut") shows at the points (path, "in" or "out", index of the tensor)."""


class _Runner:
    """Runs both models from the middle, batch by batch, and keeps what the next stage needs on disk."""

    def __init__(self, prefixes: dict[str, Prefix], spool: Spool, data: Batches) -> None:
        self.prefixes, self.spool, self.data = prefixes, spool, data

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        device = next(self.prefixes["dense"].model.parameters()).device
        for i, batch in enumerate(self.data):
            yield i, batch.to(device)

    def run(
        self, which: str, stage: int, index: int, batch: Tensor, points: list[tuple], *, keep: bool
    ) -> list[Tensor]:
        """Run one model from a stage and return what is seen at the points, in their order.

        Args:
            points: (path, "in" or "out", index of the tensor); the forward ends at the last one that is reached.
            keep: run to the end of the stage's block and store its output.
        """
        prefix = self.prefixes[which]
        at = stage if prefix.sound else 0
        value = self.spool.get((which, index)) if at else None
        found: list[list[Tensor]] = [[] for _ in points]
        with ExitStack() as stack:
            stack.enter_context(prefix.resumed(at, value))
            for point, into in zip(points, found, strict=True):
                last = not keep and point is points[-1]
                path, side, which_tensor = point
                module = prefix.model.get_submodule(path)
                stack.enter_context(grabbed(module, side, which_tensor, into, stop=last))
            if keep:
                handle = prefix.model.get_submodule(prefix.blocks[stage]).register_forward_hook(
                    lambda _m, _a, out: self._store((which, index), out)
                )
                stack.callback(handle.remove)
            stack.enter_context(suppress(Stop))
            prefix.forward(prefix.model, batch)
        return [tensors[0] for tensors in found]

    def _store(self, key: tuple, out: Any) -> None:
        self.spool.put(key, out)
        raise Stop

    def keep_dense(self, stage: int, targets: list[Target]) -> None:
        """One pass of the dense model over a stage: store its targets, and its output for the next stage."""
        points = [point_of(t) for t in targets]
        keep = self._storable(stage)
        if not points and not keep:
            return
        for index, batch in self.batches():
            for target, seen in zip(targets, self.run("dense", stage, index, batch, points, keep=keep), strict=True):
                self.spool.put((target.consumer.module, index), seen)

    def advance(self, which: str, stage: int) -> None:
        """Store the output of a stage's block, all its layers being settled."""
        if self._storable(stage):
            for index, batch in self.batches():
                self.run(which, stage, index, batch, [], keep=True)

    def _storable(self, stage: int) -> bool:
        return self.prefixes["dense"].sound and stage < len(self.prefixes["dense"].blocks)


def point_of(target: Target) -> tuple[str, str, int]:
    """Where the dense model shows what the layer should lead to: the stream after it, or its own output."""
    residual = target.consumer.residual
    if target.inside and residual is not None:
        return residual.module, residual.side, residual.index
    return target.consumer.module, "out", 0


def refit_layer(
    small: nn.Module,
    target: Target,
    runner: Runner,
    statistics: Statistics | None,
    power: float,
    add_bias: bool,
) -> list[str]:
    """Refit one layer of a cut model in place; the dense model's side, by (path, index), is in the runner's spool.

    Returns:
        The name of a bias that was added, if one was.
    """
    consumer, path = target.consumer, target.consumer.module
    scale = _scale(small, target)
    start_ND = read_weight(small, consumer)[:, :, 0]
    module, _ = owner_of(small, consumer.weight)
    constant = isinstance(getattr(module, "bias", None), Tensor) or add_bias
    energy = None
    if statistics is not None and path in statistics.layers:
        energy = statistics.layers[path].position_weights(power)
    residual = consumer.residual if target.inside else None
    moments = Moments(start_ND.shape[0], start_ND.shape[1])
    points = [(path, "in", 0), (path, "out", 0), point_of(target)]
    for index, batch in runner.batches():
        h, y, seen = runner.run("cut", target.stage, index, batch, points, keep=False)
        goal = runner.spool.get((path, index))
        images = batch.shape[0]
        h_BPN, y_BPD = rows(h, consumer, images), rows(y, consumer, images)
        goal_BPD = rows(goal if residual is None else as_output(goal, residual), consumer, images)
        goal_BPD = goal_BPD if target.outputs is None else goal_BPD[..., target.outputs]
        if residual is not None:
            gap_BPD = (goal_BPD - rows(as_output(seen, residual), consumer, images)) / scale
        else:
            gap_BPD = goal_BPD - y_BPD
        weights = energy if energy is not None and len(energy) == h_BPN.shape[1] else None
        moments.add(h_BPN, gap_BPD, weights)
        runner.spool.drop((path, index))
    step_ND, shift_D = moments.solve(constant)
    write_weight_(small, consumer, (start_ND + step_ND)[:, :, None])
    name = add_to_bias_(small, consumer, shift_D, may_add=add_bias)
    return [name] if name else []


def _scale(model: nn.Module, target: Target) -> Tensor | float:
    """[D]: by what the layer's output is multiplied before it meets the stream; near-zero entries are left alone."""
    residual = target.consumer.residual
    scale = scale_of(model, residual) if target.inside and residual is not None else 1.0
    if not isinstance(scale, Tensor):
        return scale
    return torch.where(scale.abs() < 1e-3 * scale.abs().max(), torch.full_like(scale, float("inf")), scale)


class Moments:
    """Weighted sums, over either half of the images, for the regression of a gap on inputs and a constant."""

    def __init__(self, n: int, d: int) -> None:
        self.moments = [torch.zeros(n + 1, n + 1) for _ in range(2)]
        self.crosses = [torch.zeros(n + 1, d) for _ in range(2)]
        self.images = 0

    def add(self, h_BPN: Tensor, gap_BPD: Tensor, weights: Tensor | None) -> None:
        """Add a batch; weights are [P] or [B, P]."""
        ones = torch.ones_like(h_BPN[..., :1])
        x_BPN = torch.cat([h_BPN, ones], -1).float()
        wx_BPN = x_BPN if weights is None else x_BPN * weights.to(x_BPN)[..., None]
        for half in range(2):
            every_other = slice((half + self.images) % 2, None, 2)
            x, wx, gap = (t[every_other].flatten(0, 1) for t in (x_BPN, wx_BPN, gap_BPD))
            self.moments[half] += (wx.T @ x).cpu()
            self.crosses[half] += (wx.T @ gap.float()).cpu()
        self.images += h_BPN.shape[0]

    def solve(self, constant: bool) -> tuple[Tensor, Tensor]:
        """Step of the weight [N, D] and of the bias [D], float64."""
        n = len(self.moments[0]) - 1
        size = n + 1 if constant else n
        moments = [m[:size, :size] for m in self.moments]
        crosses = [c[:size] for c in self.crosses]
        ridge = min(RIDGES, key=lambda r: _cross_validated(moments, crosses, n, r))
        moment, cross = (torch.stack(halves).double().sum(0) for halves in (moments, crosses))
        step = _regress(moment, cross, n, ridge)
        return step[:n], step[n] if constant else torch.zeros(step.shape[1], dtype=torch.double)


def _cross_validated(moments: list[Tensor], crosses: list[Tensor], n: int, ridge: float) -> float:
    """Squared error, up to a constant, of each half under the regression on the other half."""
    error = 0.0
    for mine, other in ((0, 1), (1, 0)):
        step = _regress(moments[mine], crosses[mine], n, ridge)
        error += float((step * (moments[other] @ step - 2 * crosses[other])).sum())
    return error


def _regress(moment: Tensor, cross: Tensor, n: int, ridge: float) -> Tensor:
    """Ridge regression; the first n inputs are shrunk, relative to their mean square, the constant is not."""
    scale = moment.diagonal()[:n].mean().clamp_min(1e-12)
    penalty = torch.full((len(moment),), float(ridge * scale), dtype=moment.dtype)
    penalty[n:] = 1e-6 * moment.diagonal()[n:]
    return torch.cholesky_solve(cross, damped_cholesky(moment + penalty.diag(), 0.0))
