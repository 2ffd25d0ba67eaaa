"""Weight x gradient sums: what LLM-Pruner and SDMPrune score by, without a gradient ever kept on a weight.

The gradient of a layer's weight for one example follows from what goes in and the gradient of what comes out; it is
made for one layer at a time, reduced to a number a unit, and dropped.

Shapes: B examples, T tokens, I inputs and O outputs of a layer, U units, N rows along the axis where units lie, R
weights of a row (rows of producers, columns of consumers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from secateur.anatomy.types import Anatomy, PrunableGroup, Slot
from secateur.nn.params import conv1d_like, owner_of


@dataclass
class WeightSums:
    """Sums over one weight's rows, for the units of one group (all tensors [U]); s = w dL/dw is an element's saliency.

    Attributes:
        vector: over examples, of s summed over the row: signed.
        first: over batches, of |s| with the gradient of the whole batch, summed over the row.
        second: over examples, of s^2, summed over the row.
        mixed: over batches, of |s - s^2 / 2|, the square per example, summed over the row.
    """

    vector: Tensor
    first: Tensor
    second: Tensor
    mixed: Tensor

    @classmethod
    def zeros(cls, units: int) -> WeightSums:
        return cls(*(torch.zeros(units) for _ in fields(cls)))


@dataclass(frozen=True)
class _Place:
    """One weight that belongs to a group."""

    group: PrunableGroup
    slot: Slot

    @property
    def key(self) -> str:
        return f"{self.group.name}@{self.slot.name}"


class WeightWatch:
    """Adds up the sums of one model's linear layers and convolutions; enter `watching` around calibration.

    Args:
        losses: names of the losses to collect for.
        phase: says which loss is running backward.

    Attributes:
        sums: by loss, then by "<group>@<weight>".
        joint: by loss, then by group: sum over examples of the mean over R of |s added over the group's weights|, where
            all of them have the same layout (SDMPrune).
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, losses: tuple[str, ...], phase: Callable[[], str]) -> None:
        self.model, self.losses, self.phase = model, losses, phase
        self.layers: dict[str, list[_Place]] = {}
        for group in anatomy.cuttable.values():
            for slot in group.slots:
                path, _, leaf = slot.name.rpartition(".")
                module = owner_of(model, slot.name)[0]
                if leaf == "weight" and slot.role != "other" and _readable(module):
                    self.layers.setdefault(path, []).append(_Place(group, slot))
        self.members: dict[str, int] = {}
        for places in self.layers.values():
            for place in places:
                self.members[place.group.name] = self.members.get(place.group.name, 0) + 1
        self.sums: dict[str, dict[str, WeightSums]] = {name: {} for name in losses}
        self.joint: dict[str, dict[str, Tensor]] = {name: {} for name in losses}
        self._parts: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            self.model.get_submodule(path).register_forward_hook(
                lambda module, args, out, places=places: self._ran(module, args[0], out, places)
            )
            for path, places in self.layers.items()
            if self.losses
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _ran(self, module: nn.Module, x: Tensor, out: Tensor, places: list[_Place]) -> None:
        if torch.is_grad_enabled() and out.requires_grad:
            x = x.detach()
            out.register_hook(lambda g: self._add(module, x, g, places))

    def _add(self, module: nn.Module, x: Tensor, gradient: Tensor, places: list[_Place]) -> None:
        loss = self.phase()
        if loss not in self.losses:
            return
        weight = module.weight.detach().float()  # type: ignore[operator]
        s_B = _gradients(module, x.float(), gradient.float()) * weight
        for place in places:
            s_BNR = s_B.movedim(place.slot.axis + 1, 1).flatten(2)
            held = self.sums[loss].setdefault(place.key, WeightSums.zeros(place.group.size))
            total_NR, square_NR = s_BNR.sum(0), s_BNR.square().sum(0)
            for name, value_N in (
                ("vector", total_NR.sum(1)),
                ("first", total_NR.abs().sum(1)),
                ("second", square_NR.sum(1)),
                ("mixed", (total_NR - 0.5 * square_NR).abs().sum(1)),
            ):
                getattr(held, name).add_(_by_unit(value_N.cpu(), place))
            self._join(loss, place, s_BNR)

    def _join(self, loss: str, place: _Place, s_BNR: Tensor) -> None:
        """Keep a weight's saliencies until those of the group's other weights are there."""
        name = place.group.name
        own = place.slot.units >= 0
        order = place.slot.units[own].argsort(stable=True)
        parts = self._parts.setdefault(name, [])
        parts.append(s_BNR[:, torch.nonzero(own)[:, 0][order]])
        if len(parts) < self.members[name]:
            return
        del self._parts[name]
        if len({p.shape for p in parts}) > 1:
            return
        units = place.slot.units[own][order]
        value_N = torch.stack(parts).sum(0).abs().mean(2).sum(0).cpu()
        held = self.joint[loss].setdefault(name, torch.zeros(place.group.size))
        held.index_add_(0, units, value_N)


_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: conv1d_weight,
    nn.Conv2d: conv2d_weight,
    nn.Conv3d: conv3d_weight,
}


def _readable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or conv1d_like(module) or type(module) in _CONVOLUTIONS


def _gradients(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """[B, *weight shape]: the gradient of a layer's weight, per example."""
    if isinstance(module, nn.modules.conv._ConvNd):
        function, how = _CONVOLUTIONS[type(module)], (module.stride, module.padding, module.dilation, module.groups)
        shape = module.weight.shape
        pairs = zip(x.split(1), gradient.split(1), strict=True)
        return torch.stack([function(a, shape, b, *how) for a, b in pairs])
    batch = x.shape[0] if x.dim() > 2 else 1
    x_BTI, g_BTO = (t.reshape(batch, -1, t.shape[-1]) for t in (x, gradient))
    return torch.einsum("bti,bto->bio" if conv1d_like(module) else "bti,bto->boi", x_BTI, g_BTO)


def _by_unit(value_N: Tensor, place: _Place) -> Tensor:
    own = place.slot.units >= 0
    return torch.zeros(place.group.size).index_add_(0, place.slot.units[own], value_N[own])
