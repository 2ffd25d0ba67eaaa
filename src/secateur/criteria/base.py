"""What a criterion sees of a group, and the registry.

A criterion is one function from a `GroupView` to one number per unit, higher = keep. It says what it needs, so that
calibration collects just that.

Shapes: U units, N input features of a consumer, D its outputs, R rows of a producer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Consumer, Kind, PrunableGroup
from secateur.calibration.statistics import LayerSums, Statistics, TaylorSums
from secateur.calibration.stream import StreamSums
from secateur.calibration.weights import WeightSums
from secateur.errors import DataError
from secateur.nn.params import get_tensor
from secateur.registry import Registry


@dataclass(frozen=True)
class Reading:
    """How one consumer reads a group.

    Attributes:
        consumer: the layer.
        weight: [N, D], its weight, input features first, kernel positions counted as outputs.
        units: [N], the unit of each input feature, or -1.
        sums: statistics at its input, if there are any.
    """

    consumer: Consumer
    weight: Tensor
    units: Tensor
    sums: LayerSums | None


@dataclass(frozen=True)
class GroupView:
    """A group with its weights and statistics, as a criterion reads them; and the paths of the model's blocks."""

    group: PrunableGroup
    model: nn.Module
    statistics: Statistics | None
    seed: int = 0
    options: dict[str, float | str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.group.size

    def readings(self) -> Iterator[Reading]:
        """Every consumer with a weight that can be read as a matrix."""
        for consumer in self.group.consumers:
            weight = get_tensor(self.model, consumer.weight).detach().float().cpu()
            matrix = weight.movedim(consumer.axis, 0).flatten(1)
            if matrix.shape[0] != len(consumer.units):
                continue  # a grouped convolution: its columns repeat
            sums = None if self.statistics is None else self.statistics.layers.get(consumer.module)
            yield Reading(consumer, matrix, consumer.units, sums)

    def producer_rows(self) -> Tensor:
        """[U, R]: everything that makes a unit, biases left out, flattened."""
        rows = [self._rows(s.name, s.axis, s.units) for s in self.group.slots if s.role == "producer"]
        if not rows:
            raise DataError(f"group '{self.group.name}' has no producer weights to score")
        return torch.cat(rows, dim=1)

    def producers(self) -> Iterator[Tensor]:
        """[U, R] of every producer's weight by itself, biases left out."""
        for slot in self.group.slots:
            if slot.role == "producer":
                yield self._rows(slot.name, slot.axis, slot.units)

    def consumer_rows(self) -> Tensor:
        """[U, R]: everything that reads a unit, flattened; of an expert, its own matrices."""
        readers = [s for s in self.group.slots if s.role == "consumer"]
        if not readers and self.group.kind is Kind.EXPERTS:
            readers = [s for s in self.group.slots if s.role == "other" and get_tensor(self.model, s.name).dim() > 1]
        rows = [self._rows(s.name, s.axis, s.units) for s in readers]
        return torch.cat(rows, dim=1) if rows else torch.zeros(self.size, 1)

    def _rows(self, name: str, axis: int, units: Tensor) -> Tensor:
        weight = get_tensor(self.model, name).detach().float().cpu().movedim(axis, 0).flatten(1)
        order = [torch.nonzero(units == u)[:, 0] for u in range(self.size)] if self._ragged(units) else None
        if order is None:
            own = units >= 0
            return weight[own][units[own].argsort(stable=True)].reshape(self.size, -1)
        return torch.stack([weight[i].flatten() for i in order])

    def _ragged(self, units: Tensor) -> bool:
        counts = torch.bincount(units[units >= 0], minlength=self.size)
        return bool((counts != counts[0]).any())

    def per_unit(self, values: Tensor, units: Tensor) -> Tensor:
        """Sum a value per input feature [N] over the features of each unit: [U]."""
        own = units >= 0
        return torch.zeros(self.size, dtype=values.dtype).index_add_(0, units[own], values[own])

    def taylor(self, loss: str) -> TaylorSums:
        """Gradient x activation sums of one loss, added over the group's consumers.

        Raises:
            DataError: the statistics were gathered without this loss.
        """
        held = {} if self.statistics is None else self.statistics.taylor.get(loss, {})
        found = [held[key] for c in self.group.consumers if (key := f"{self.group.name}@{c.module}") in held]
        if not found:
            have = "none" if self.statistics is None else ", ".join(self.statistics.losses) or "none"
            raise DataError(
                f"these statistics hold no gradients of loss '{loss}' (they hold: {have}); calibrate with it"
            )
        total = TaylorSums.zeros(self.size)
        for sums in found:
            for name in ("signed", "sample", "squared", "token"):
                getattr(total, name).add_(getattr(sums, name))
        return total

    def weight_sums(self, loss: str) -> dict[str, WeightSums]:
        """Weight x gradient sums of one loss, by the role and the name of the group's weights, producers first.

        Raises:
            DataError: the statistics were gathered without them.
        """
        held = {} if self.statistics is None else self.statistics.weights.get(loss, {})
        slots = sorted((s for s in self.group.slots if s.role != "other"), key=lambda s: s.role == "consumer")
        found = {f"{s.role} {s.name}": held[key] for s in slots if (key := f"{self.group.name}@{s.name}") in held}
        if not found:
            raise DataError(
                f"these statistics hold no weight x gradient sums of loss '{loss}' for '{self.group.name}'; calibrate "
                f"with loss='{loss}', weights='{loss}' (linear layers only)"
            )
        return found

    def stream(self) -> tuple[StreamSums, Tensor]:
        """For a group of whole blocks: the sums over the stream, and the indices [U + 1] of its places among them.

        Raises:
            DataError: they were not collected, or the stream changes its shape on the way.
        """
        sums = None if self.statistics is None else self.statistics.stream
        members = self.group.stack.members if self.group.stack else ()
        if sums is None or not set(members) <= set(self.blocks):
            raise DataError(f"these statistics hold nothing about the blocks of '{self.group.name}'; calibrate again")
        first = self.blocks.index(members[0])
        if tuple(self.blocks[first : first + len(members)]) != members or float(sums.count) == 0:
            raise DataError(
                f"the stream changes on its way through the blocks of this model, so those of '{self.group.name}' "
                "cannot be compared; write the plan by hand"
            )
        return sums, torch.arange(first, first + len(members) + 1)

    def option(self, name: str, default: float | str) -> float | str:
        return self.options.get(name, default)


@dataclass(frozen=True)
class Criterion:
    """A scoring rule.

    Attributes:
        score: from a view of a group to [U], higher = keep.
        data: it needs statistics at all.
        covariance: it needs outer products.
        losses: it needs the gradients of these losses.
        weights: it needs weight x gradient sums of these losses.
        projected: it needs what every head adds to its layer's output.
        moments: it scores query/key dimensions as well, which no layer reads.
        weighting: its covariances are better weighted by how much a token matters.
        options: names of the options it reads.
        between: for criteria of whole blocks: from a view of a stack to [U + 1, U + 1], how far the stream turns from
            the place before block i to the place before block j.
    """

    score: Callable[[GroupView], Tensor]
    data: bool = True
    covariance: bool = False
    losses: tuple[str, ...] = ()
    weighting: str | None = None
    options: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    projected: bool = False
    moments: bool = False
    between: Callable[[GroupView], Tensor] | None = None

    @property
    def blocks(self) -> bool:
        """Whether it scores whole blocks, and nothing else."""
        return self.between is not None


criteria: Registry[Criterion] = Registry("criterion")


def criterion(
    name: str,
    *,
    data: bool = True,
    covariance: bool = False,
    losses: tuple[str, ...] = (),
    weighting: str | None = None,
    options: tuple[str, ...] = (),
    moments: bool = False,
    weights: tuple[str, ...] = (),
    projected: bool = False,
) -> Callable[[Callable[[GroupView], Tensor]], Callable[[GroupView], Tensor]]:
    """Decorator: register a function from `GroupView` to [U] scores as a criterion."""

    def add(function: Callable[[GroupView], Tensor]) -> Callable[[GroupView], Tensor]:
        rule = Criterion(function, data, covariance, losses, weighting, options, weights, projected, moments)
        criteria.register(name)(rule)
        return function

    return add


def block_criterion(name: str) -> Callable[[Callable[[GroupView], Tensor]], Callable[[GroupView], Tensor]]:
    """Decorator: register a function from a `GroupView` of a stack to [U + 1, U + 1] as a criterion of whole blocks.

    Entry (i, j) says how far the stream turns from the place before block i to the place before block j; a block's
    score is its own turn.
    """

    def add(between: Callable[[GroupView], Tensor]) -> Callable[[GroupView], Tensor]:
        criteria.register(name)(Criterion(lambda view: between(view).diagonal(1).clone(), between=between))
        return between

    return add


def need(reading: Reading) -> LayerSums:
    """The statistics at a consumer's input.

    Raises:
        DataError: there are none.
    """
    if reading.sums is None:
        raise DataError(f"no statistics at '{reading.consumer.module}'; calibrate this model first")
    return reading.sums
