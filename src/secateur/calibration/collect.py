"""Hooks that turn one batch into sums.

Shapes: B images, P positions per image, N input features, D output features, U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.anatomy.types import Anatomy, Consumer, PrunableGroup, Residual
from secateur.calibration.statistics import LayerSums, Statistics, TaylorSums, position_weights
from secateur.nn.params import get_tensor
from secateur.nn.trees import tensors_in


def rows(x: Tensor, consumer: Consumer, images: int, features: int | None = None) -> Tensor:
    """A layer's input or output as [B, P, N]: examples first, features last, everything else between.

    Args:
        images: B; where windows were folded into the batch axis they are unfolded into positions.
        features: the feature axis, if it is not the consumer's own.
    """
    x = x.movedim(consumer.features if features is None else features, -1)
    if consumer.batch:
        x = x.movedim(consumer.batch, 0)
    count = images if x.shape[0] % images == 0 else x.shape[0]
    return x.reshape(count, -1, x.shape[-1])


def as_output(stream: Tensor, residual: Residual) -> Tensor:
    """A stream's axes in the order of those of the layer that writes into it."""
    order = residual.order
    return stream if order == tuple(range(len(order))) else stream.permute([order.index(i) for i in range(len(order))])


def scale_of(model: nn.Module, residual: Residual) -> Tensor | float:
    """[D]: by what a layer's output is multiplied before it meets the stream (LayerScale), or 1."""
    scale: Tensor | float = 1.0
    for name in residual.scales:
        scale = scale * get_tensor(model, name).detach().float().flatten()
    return scale


@dataclass
class _Watch:
    """One layer to watch, and the groups whose units are seen at its input."""

    consumer: Consumer
    groups: list[tuple[PrunableGroup, Tensor]]


def consumers_of(
    anatomy: Anatomy, groups: Iterable[str] | None = None
) -> dict[str, list[tuple[PrunableGroup, Consumer]]]:
    """By layer: the cuttable groups observed there."""
    wanted = set(anatomy.cuttable if groups is None else groups)
    out: dict[str, list[tuple[PrunableGroup, Consumer]]] = {}
    for name, group in anatomy.cuttable.items():
        if name in wanted:
            for consumer in group.consumers:
                out.setdefault(consumer.module, []).append((group, consumer))
    return out


class Collector:
    """Accumulates `Statistics` while a model runs; use `watching`.

    Args:
        covariance: also collect outer products.
        weighting: the loss whose gradient weighs the tokens; None for equal weights.
        power: exponent of the gradient energy in a token's weight.
        losses: names of the losses that will be run backward, in order.
        projected: also collect what each unit of several features adds to the layer's output.
        again: the loss in whose backward pass checkpointed blocks run again; moments are then taken there.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        *,
        covariance: bool,
        weighting: str | None,
        power: float,
        losses: tuple[str, ...] = (),
        again: str | None = None,
        projected: bool = False,
    ) -> None:
        self.model, self.covariance, self.weighting, self.power = model, covariance, weighting, power
        self.again, self.projected = again, projected
        self.statistics = Statistics(taylor={name: {} for name in losses})
        self.phase = "forward"
        self.images = 1
        self._written: dict[str, Tensor] = {}
        self.watches: dict[str, _Watch] = {}
        for path, found in consumers_of(anatomy).items():
            consumer = found[0][1]
            self.watches[path] = _Watch(consumer, [(g, c.units) for g, c in found])
            self.statistics.layers[path] = LayerSums.zeros(len(consumer.units))
            for loss in losses:
                for group, _ in found:
                    self.statistics.taylor[loss][f"{group.name}@{path}"] = TaylorSums.zeros(group.size)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for path, watch in self.watches.items():

            def hook(module, args, out, path=path, watch=watch):
                self._seen(path, watch, args[0], out)

            handles.append(self.model.get_submodule(path).register_forward_hook(hook))
            if watch.consumer.residual is not None:
                handles.append(self._watch_stream(path, watch.consumer, watch.consumer.residual))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch_stream(self, path: str, consumer: Consumer, residual: Residual) -> RemovableHandle:
        """Compare what a layer wrote with the stream right after."""

        def see(tree: object) -> None:
            written = self._written.pop(path, None)
            if written is not None:
                stream = list(tensors_in(tree))[residual.index].detach()
                stream_BPD = rows(as_output(stream, residual), consumer, self.images).float()
                b_BPD = rows(written, consumer, self.images).float() * scale_of(self.model, residual)
                b_BPD = b_BPD - b_BPD.mean((0, 1))
                s_BPD = stream_BPD - stream_BPD.mean(-1, keepdim=True)
                shares = b_BPD.square().sum(-1) / s_BPD.square().sum(-1).clamp_min(1e-12)
                self.statistics.layers[path].add("share", shares.sum())

        module = self.model.get_submodule(residual.module)
        if residual.side == "in":
            return module.register_forward_pre_hook(lambda _m, args, kwargs: see((args, kwargs)), with_kwargs=True)
        return module.register_forward_hook(lambda _m, _a, out: see(out))

    def _seen(self, path: str, watch: _Watch, x: Tensor, out: Tensor) -> None:
        graph = torch.is_grad_enabled() and x.requires_grad
        if self.phase == "forward" and watch.consumer.residual is not None:
            self._written[path] = out.detach()
        if self.again is not None and not graph:
            return
        sums = self.statistics.layers[path]
        h_BPN = rows(x.detach(), watch.consumer, self.images).float()
        if self.phase in ("forward", self.again):
            sums.add("count", torch.tensor(float(h_BPN.shape[0] * h_BPN.shape[1])))
            sums.add("total", h_BPN.sum((0, 1)))
            sums.add("square", h_BPN.square().sum((0, 1)))
            sums.add("absolute", h_BPN.abs().sum((0, 1)))
            if self.weighting is None:
                self._weighted(sums, h_BPN, torch.ones(h_BPN.shape[1]))
            if self.projected:
                self._project(path, watch, h_BPN)
        if graph:
            x.register_hook(lambda g: self._taylor(path, watch, h_BPN, g))
            if self.weighting is not None:
                out.register_hook(lambda g: self._energy(watch, sums, h_BPN, g))

    def _project(self, path: str, watch: _Watch, h_BPN: Tensor) -> None:
        """Sum over tokens of || sum over a unit's features of h_n W_n ||_1, for units of several features."""
        weight = get_tensor(self.model, watch.consumer.weight).detach().float()
        weight_ND = weight.movedim(watch.consumer.axis, 0).flatten(1)
        for group, units in watch.groups:
            counts = torch.bincount(units[units >= 0], minlength=group.size)
            if int(counts.max()) < 2 or weight_ND.shape[0] != len(units):
                continue
            held = self.statistics.projected.setdefault(f"{group.name}@{path}", torch.zeros(group.size))
            for unit in range(group.size):
                own = units == unit
                held[unit] += float((h_BPN[..., own] @ weight_ND[own]).abs().sum())

    def _weighted(self, sums: LayerSums, h_BPN: Tensor, weights_P: Tensor) -> None:
        weighted = h_BPN * weights_P.to(h_BPN.device)[None, :, None]
        sums.add("weight", weights_P.sum() * h_BPN.shape[0])
        sums.add("first", weighted.sum((0, 1)))
        if self.covariance:
            sums.add("outer", weighted.flatten(0, 1).T @ h_BPN.flatten(0, 1))

    def _energy(self, watch: _Watch, sums: LayerSums, h_BPN: Tensor, gradient: Tensor) -> None:
        if self.phase != self.weighting:
            return
        g_BPD = rows(gradient, watch.consumer, self.images).float()
        if g_BPD.shape[:2] != h_BPN.shape[:2]:  # a strided convolution: output positions are not input positions
            self._weighted(sums, h_BPN, torch.ones(h_BPN.shape[1]))
            return
        energy_P = g_BPD.square().sum((0, 2)).cpu()
        sums.add("energy", energy_P)
        weights = position_weights(energy_P, self.power)
        self._weighted(sums, h_BPN, torch.ones(h_BPN.shape[1]) if weights is None else weights)

    def _taylor(self, path: str, watch: _Watch, h_BPN: Tensor, gradient: Tensor) -> None:
        product_BPN = h_BPN * rows(gradient, watch.consumer, self.images).float()
        for group, units in watch.groups:
            sums = self.statistics.taylor[self.phase][f"{group.name}@{path}"]
            product_BPU = _by_unit(product_BPN, units, group.size)
            sample_BU = product_BPU.sum(1)
            for name, value in (("signed", sample_BU), ("sample", sample_BU.abs()), ("squared", sample_BU.square())):
                getattr(sums, name).add_(value.sum(0).cpu())
            sums.token.add_(product_BPU.abs().sum((0, 1)).cpu())


def _by_unit(x_BPN: Tensor, units: Tensor, size: int) -> Tensor:
    """Sum features that belong to one unit: [B, P, N] -> [B, P, U]."""
    if len(units) == size and bool((units == torch.arange(size)).all()):
        return x_BPN
    owned = units >= 0
    out = x_BPN.new_zeros(*x_BPN.shape[:2], size)
    return out.index_add_(2, units[owned].to(x_BPN.device), x_BPN[..., owned])


@contextmanager
def sliver_cut(model: nn.Module, anatomy: Anatomy, share: float = 0.03) -> Iterator[None]:
    """Within the context, the weakest few units of every group (by weight magnitude) are silent."""
    handles = []
    for path, found in consumers_of(anatomy).items():
        keep = torch.ones(len(found[0][1].units))
        for group, consumer in found:
            weight = get_tensor(model, consumer.weight).detach().float().movedim(consumer.axis, 0).flatten(1)
            if weight.shape[0] != len(consumer.units):
                continue  # grouped convolution
            norms = torch.zeros(group.size).index_add_(
                0, consumer.units[consumer.units >= 0], weight.norm(dim=1)[consumer.units >= 0]
            )
            gone = norms.argsort()[: max(1, int(share * group.size))] if group.size > 1 else norms.argsort()[:0]
            keep[torch.isin(consumer.units, gone)] = 0

        def mute(_module, args, keep=keep, consumer=found[0][1]):
            shape = [1] * args[0].dim()
            shape[consumer.features] = -1
            return (args[0] * keep.to(args[0]).view(shape), *args[1:])

        handles.append(model.get_submodule(path).register_forward_pre_hook(mute))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
