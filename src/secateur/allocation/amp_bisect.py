"""`amp-bisect`: AMP's own search, last block to first, with an entropy tolerance.

Source: Adaptive MLP Pruning (arXiv 2603.08100). For each group from the last block to the first, bisection (6 steps) on
the kept count; a count is accepted if E(pruned so far, with this count) - E(pruned so far) <= tolerance, E being the
mean entropy of the in-batch softmax over CLS similarities. The test is signed, as published: a fall of the entropy is
always accepted.

The inputs of every block in the dense network are computed once and kept on disk, so that no block below the one
searched is ever run again; of that block, what comes before the layer whose inputs are masked runs once a batch. Groups
already settled are sliced, unless another group shares an axis with them. All this leaves every decision as it is.

Options: tolerance (5e-3), steps (6). With a budget of parameters or multiply-accumulates the tolerance itself is
bisected (`rounds`, 5) on the same cached inputs, and the plan settled between the last two tolerances.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from secateur.allocation.base import Problem, allocator, best_units, evened
from secateur.anatomy.masked import masked
from secateur.anatomy.types import PrunableGroup
from secateur.anatomy.verify import cut_module_
from secateur.calibration.losses import similarities
from secateur.data import Batches
from secateur.errors import BudgetError
from secateur.models import features
from secateur.nn.attention import explicit_attention
from secateur.progress import track
from secateur.replay import Lead, Prefix, Spool


@allocator("amp-bisect", measures=True, options=("tolerance", "steps", "rounds"))
def amp_bisect(problem: Problem) -> dict[str, int]:
    """Counts found by AMP's search."""
    search = Search.of(problem)
    steps = int(problem.options.get("steps", 6))
    if "tolerance" in problem.options or math.isinf(problem.target):
        return evened(problem, search.run(problem, float(problem.options.get("tolerance", 5e-3)), steps))
    return _to_budget(problem, search, steps, int(problem.options.get("rounds", 5)))


def _to_budget(problem: Problem, search: Search, steps: int, rounds: int) -> dict[str, int]:
    """Bisect the logarithm of the tolerance, then settle between the two plans nearest to the budget."""
    low, high = math.log(1e-5), math.log(1.0)
    wide, narrow = {g.name: g.size for g in problem.groups}, None
    for _ in track(range(rounds), "Searching the tolerance"):
        middle = (low + high) / 2
        counts = evened(problem, search.run(problem, math.exp(middle), steps))
        if problem.cost(counts) <= problem.target:
            high, narrow = middle, counts
        else:
            low, wide = middle, counts
    if narrow is None:
        raise BudgetError("amp-bisect found no tolerance below 1 that meets the budget; use 'global' or 'curve'")
    return narrow if problem.uniform else between(problem, wide, narrow)


def between(problem: Problem, wide: dict[str, int], narrow: dict[str, int]) -> dict[str, int]:
    """From a plan above the budget towards one within it, group by group, the last block first as in the search.

    The group at which the budget is met is narrowed only as far as needed.
    """
    counts = dict(wide)
    for group in reversed(problem.groups):
        counts[group.name] = narrow[group.name]
        if problem.cost(counts) <= problem.target:
            fitting = (k for k in problem.allowed(group) if problem.cost(counts | {group.name: k}) <= problem.target)
            return counts | {group.name: max(fitting)}
    return dict(narrow)


def _crossed(groups: list[PrunableGroup]) -> set[str]:
    """Groups that share an axis of some weight with another: query heads within key/value groups."""
    owners: dict[tuple[str, int], list[str]] = {}
    for group in groups:
        for slot in group.slots:
            owners.setdefault((slot.name, slot.axis), []).append(group.name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


class _Standing:
    """Settled groups that are not sliced, since another shares an axis with them: masked together, an owner's at once.

    Args:
        model: the working copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._cuts: dict[str, list[tuple[PrunableGroup, Tensor]]] = {}
        self._open: dict[str, ExitStack] = {}

    @contextmanager
    def trying(self, group: PrunableGroup, keep: Tensor) -> Iterator[None]:
        """Within the context, one more group is masked."""
        self._lift(group.owner)
        try:
            with masked(self.model, [*self._cuts.get(group.owner, []), (group, keep)]):
                yield
        finally:
            self._lay(group.owner)

    def settle(self, group: PrunableGroup, keep: Tensor) -> None:
        self._lift(group.owner)
        self._cuts.setdefault(group.owner, []).append((group, keep))
        self._lay(group.owner)

    def _lift(self, owner: str) -> None:
        if owner in self._open:
            self._open.pop(owner).close()

    def _lay(self, owner: str) -> None:
        if owner in self._cuts:
            self._open[owner] = ExitStack()
            self._open[owner].enter_context(masked(self.model, self._cuts[owner]))


@dataclass
class Search:
    """AMP's search on one model and one set of images.

    Attributes:
        model: the dense model.
        data: the images on which the entropy is measured.
        prefix: the dense model, to be run from the middle.
        cached: answer what does not change from disk; False gives the naive search, for comparison.
    """

    model: nn.Module
    data: Batches
    prefix: Prefix
    cached: bool = True
    _spool: Spool = field(default_factory=Spool)
    _dense: float | None = None

    @classmethod
    def of(cls, problem: Problem, cached: bool = True) -> Search:
        if problem.model is None or problem.data is None:
            raise BudgetError("allocator 'amp-bisect' measures the model: give allocate(..., model=, data=)")
        prefix = Prefix(problem.model, problem.anatomy.blocks, features)
        search = cls(problem.model, problem.data, prefix, cached)
        with explicit_attention(problem.model):
            prefix.check(next(iter(problem.data)))
        return search

    @torch.no_grad()
    def run(self, problem: Problem, tolerance: float, steps: int) -> dict[str, int]:
        """One search at one tolerance."""
        working = copy.deepcopy(self.model)
        kept = {g.name: g.size for g in problem.groups}
        crossed, standing = _crossed(problem.groups), _Standing(working)
        with explicit_attention(self.model), explicit_attention(working):
            entropy = self._dense_entropy()
            for group in track(list(reversed(problem.groups)), "Bisecting widths"):
                allowed = problem.allowed(group)
                low, high = 0, len(allowed) - 1  # the smallest is never tried below, the whole is always accepted
                accepted = entropy
                lead = self._lead(working, group)
                for _ in range(steps):
                    if low >= high:
                        break
                    middle = (low + high) // 2
                    trial = self._masked_entropy(standing, group, problem, allowed[middle], lead)
                    if trial - entropy <= tolerance:
                        high, accepted = middle, trial
                    else:
                        low = middle + 1
                kept[group.name], entropy = allowed[high], accepted
                if allowed[high] < group.size:
                    keep = torch.tensor(best_units(problem.scores.values[group.name], allowed[high]))
                    if group.name in crossed:
                        standing.settle(group, keep)
                    else:
                        cut_module_(working, group, keep)
        return kept

    @property
    def keeps(self) -> bool:
        """Whether the dense model's blocks are answered from disk."""
        return self.cached and self.prefix.sound

    def _dense_entropy(self) -> float:
        """Run the dense model, once, and keep every block's output."""
        if self._dense is None:
            self._dense = self._entropy(self.model, 0, self._kept if self.keeps else None)
        return self._dense

    @contextmanager
    def _kept(self, index: int) -> Iterator[None]:
        """Around a forward of the dense model on the batch of that number: its blocks' outputs go to disk."""
        with ExitStack() as stack:
            for i, path in enumerate(self.prefix.blocks):
                hook = self.model.get_submodule(path).register_forward_hook(
                    lambda _m, _a, out, i=i: self._spool.put((i, index), out)
                )
                stack.callback(hook.remove)
            yield

    def _stage(self, group: PrunableGroup) -> int:
        """The block that holds a group; groups outside all blocks are evaluated from the start."""
        path = group.owner + "."
        return next((i for i, b in enumerate(self.prefix.blocks) if path.startswith(b + ".")), 0)

    def _lead(self, working: nn.Module, group: PrunableGroup) -> Lead | None:
        """What comes before the group's consumers in its block."""
        block = self.prefix.blocks[self._stage(group)] if self.keeps else ""
        if not block or not group.consumers or not group.owner.startswith(block + "."):
            return None
        paths = [*(c.module for c in group.consumers), *group.norms]
        return Lead(working.get_submodule(block), [working.get_submodule(p) for p in paths])

    def _masked_entropy(
        self, standing: _Standing, group: PrunableGroup, problem: Problem, count: int, lead: Lead | None
    ) -> float:
        keep = torch.tensor(best_units(problem.scores.values[group.name], count))
        with standing.trying(group, keep):
            return self._entropy(standing.model, self._stage(group), None if lead is None else lead.run)

    def _entropy(
        self, model: nn.Module, stage: int, around: Callable[[int], AbstractContextManager[None]] | None = None
    ) -> float:
        """Mean over images of the entropy of their in-batch similarities.

        Args:
            stage: blocks below it are dense.
            around: what to enter around the forward on the batch of each number.
        """
        stage = stage if self.keeps else 0
        prefix = Prefix(model, self.prefix.blocks, features)
        prefix.sound, prefix._templates = self.prefix.sound, self.prefix._templates
        device = next(model.parameters()).device
        total, images = 0.0, 0
        for index, batch in enumerate(self.data):
            value = self._spool.get((stage - 1, index)) if stage else None
            with prefix.resumed(stage, value), around(index) if around else nullcontext():
                log_p: Tensor = similarities(features(model, batch.to(device)).embedding)
            total += float(-(log_p.exp() * log_p).sum())
            images += batch.shape[0]
        return total / max(images, 1)
