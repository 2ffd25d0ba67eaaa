"""Statistics and scores of one block after the other, from forward passes over the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.anatomy import Anatomy
from secateur.calibration import Statistics
from secateur.calibration.collect import Collector
from secateur.criteria import Scores, criteria, score
from secateur.errors import AnatomyError
from secateur.progress import track
from secateur.streaming.model import Streamed, within
from secateur.streaming.walk import Walk


class BlockSums:
    """Collects the statistics of one block while batches go through it.

    Args:
        model: the dense skeleton, with the block filled.
        anatomy: of the model.
        path: of the block.
        covariance: also collect outer products.
        projected: also collect what every head adds to its layer's output.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, path: str, *, covariance: bool, projected: bool) -> None:
        part = within(anatomy, path)
        self._collector = Collector(model, part, covariance=covariance, weighting=None, power=0.5, projected=projected)
        self.statistics: Statistics = self._collector.statistics

    @contextmanager
    def watching(self) -> Iterator[Callable[[int], None]]:
        """Yields a function to call with the number of examples before each batch."""

        def begin(examples: int) -> None:
            self._collector.images = examples
            self.statistics.images += examples

        with self._collector.watching():
            yield begin


class Turn:
    """How far a block turns the stream, as 1 - cosine and as an angle in units of pi: means over tokens.

    Args:
        walk: before the block.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk, self._cosine, self._angle, self._tokens = walk, 0.0, 0.0, 0

    def watch(self, index: int, step: Callable[[], Tensor]) -> Tensor:
        """For `collect`."""
        before = F.normalize(self._walk.states.get((self._walk.name, index)).float(), dim=-1)
        hidden = step()
        cosine = (before * F.normalize(hidden.float(), dim=-1)).sum(-1).clamp(-1, 1)
        self._cosine += float(cosine.sum())
        self._angle += float(cosine.arccos().sum()) / torch.pi
        self._tokens += cosine.numel()
        return hidden

    @property
    def means(self) -> list[float]:
        tokens = max(self._tokens, 1)
        return [1 - self._cosine / tokens, self._angle / tokens]


def collect(
    source: Streamed,
    anatomy: Anatomy,
    walk: Walk,
    block: int,
    *,
    covariance: bool,
    projected: bool = False,
    watch: Callable[[int, Callable[[], Tensor]], Tensor] | None = None,
) -> Statistics:
    """Send all batches through a filled block of the dense model and collect its statistics on the way.

    Args:
        walk: before the block; after it when this returns.
        covariance: also collect outer products.
        projected: also collect what every head adds to its layer's output.
        watch: called with the index of each batch and the step to make, whose answer it returns: to look at more.

    Raises:
        AnatomyError: the hidden states are not finite.
    """
    path = walk.blocks[block]
    sums = BlockSums(source.model, anatomy, path, covariance=covariance, projected=projected)
    module = source.model.get_submodule(path)
    with sums.watching() as begin:
        for index in walk:
            begin(walk.sizes[index])

            def step(index: int = index) -> Tensor:
                return walk.step(block, index, module)

            hidden = step() if watch is None else watch(index, step)
            if not torch.isfinite(hidden).all():
                raise AnatomyError(
                    f"the hidden states after '{path}' are not finite (NaN or infinity); check the model's weights"
                )
            walk.states.put((walk.name, index), hidden)
    return sums.statistics


def score_blocks(
    source: Streamed, anatomy: Anatomy, walk: Walk | None, criterion: str, *, curves: bool, seed: int = 0
) -> Scores:
    """Scores (and error curves) of every group that lies in a block; the sums of a block go when it is scored.

    Args:
        source: the dense model.
        anatomy: of it.
        walk: before the first block; None for criteria that need no data, if no curves are asked for.
        criterion: a name from `list_criteria()` that needs no gradients.
        curves: also collect covariances for error curves.
    """
    rule = criteria.get(criterion)
    out = Scores({}, meta={"criterion": criterion, "options": {}, "fingerprint": source.fingerprint()}, anatomy=anatomy)
    turns: list[list[float]] = []
    for i, path in enumerate(track(anatomy.blocks, "Scoring blocks")):
        with source.filled(source.names_in(path)):
            statistics = None
            if walk is not None:
                turn = Turn(walk)
                statistics = collect(
                    source,
                    anatomy,
                    walk,
                    i,
                    covariance=rule.covariance or curves,
                    projected=rule.projected,
                    watch=turn.watch,
                )
                turns.append(turn.means)
            found = score_block(source, anatomy, path, statistics, criterion, seed=seed, curves=curves)
        out.values |= found.values
        out.curves |= found.curves
    out.blocks = torch.tensor(turns)
    return out


def score_block(
    source: Streamed,
    anatomy: Anatomy,
    path: str,
    statistics: Statistics | None,
    criterion: str,
    *,
    seed: int = 0,
    curves: bool = False,
) -> Scores:
    """Scores of the groups of one block, which is filled."""
    part = within(anatomy, path)
    return score(statistics, criterion, model=source.model, anatomy=part, seed=seed, curves=curves)
