"""Cutting a model block by block: load, look, cut, refit, write, forget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from secateur.anatomy import Anatomy
from secateur.artifact.save import tensors_of
from secateur.artifact.weights import Shards, storable
from secateur.calibration import Statistics
from secateur.nn.weightless import empty_
from secateur.plan import Kept, Plan
from secateur.progress import track
from secateur.streaming.model import Streamed, within
from secateur.streaming.refit import BlockRefit
from secateur.streaming.sums import collect
from secateur.streaming.walk import Walk
from secateur.surgery import Recipe, compensators, mark_as_cut, prune_, recipe_of

Decide = Callable[[str, Statistics | None], Mapping[str, Kept]]


class Cutter:
    """Cuts the blocks of a streamed model in order of execution.

    Attributes:
        small: the cut skeleton; its weights are in the shards.
        recipe: what was changed so far.
        tied: names of written tensors that share another's.

    Args:
        source: the dense model.
        anatomy: of it.
        shards: where finished blocks are written.
        compensate: a name from `list_compensators()`.
        ridge: of the regression.
    """

    def __init__(self, source: Streamed, anatomy: Anatomy, shards: Shards, compensate: str, ridge: float) -> None:
        self.source, self.anatomy, self.shards, self.ridge = source, anatomy, shards, ridge
        self.name, self.rule = compensate, compensators.get(compensate)
        self.small = copy.deepcopy(source.model)
        self.recipe = Recipe()
        self.tied: dict[str, str] = {}

    def run(self, decide: Decide, calibration: Walk | None, held_out: Walk, **needs: bool) -> None:
        """Cut every block.

        Args:
            decide: says, from a block's path and its statistics, which units its groups keep.
            calibration: before the first block; None if neither the decisions nor the compensator need data. With a
                sequential compensator it carries the hidden states of the cut model besides, under "cut".
            held_out: before the first block; afterwards after the last, the dense model's hidden states under its own
                name and the cut one's under "cut held-out".
            needs: of the statistics, see `collect`.
        """
        for index in held_out:
            held_out.states.put(("cut held-out", index), held_out.states.get((held_out.name, index)))
        refit = None
        if calibration is not None and self.rule.sequential:
            refit = BlockRefit(self.source, self.small, self.anatomy, calibration)
        for i, path in enumerate(track(self.anatomy.blocks, "Cutting blocks")):
            names = self.source.names_in(path)
            with self.source.filled(names):
                statistics = None
                if calibration is not None:
                    watch = None if refit is None else refit.watch(i)
                    statistics = collect(self.source, self.anatomy, calibration, i, watch=watch, **needs)
                chosen = dict(decide(path, statistics))
                held_out.advance(i, self.source.model.get_submodule(path))
                self._move(names)
            self._cut(path, chosen, statistics)
            if refit is not None:
                self._added(refit.refit(i, Plan(groups=chosen)))
            block = self.small.get_submodule(path)
            held_out.advance(i, block, name="cut held-out")
            self._write(tensors_of(self.small, self.recipe.shapes, path))

    def _move(self, names: list[str]) -> None:
        """The tensors of a filled block from the dense skeleton to the other; the dense one is emptied by its owner."""
        for name in names:
            path, _, leaf = name.rpartition(".")
            ours, theirs = self.small.get_submodule(path), self.source.model.get_submodule(path)
            kind = "_buffers" if leaf in ours._buffers else "_parameters"
            getattr(ours, kind)[leaf] = getattr(theirs, kind)[leaf]

    def _cut(self, path: str, chosen: dict[str, Kept], statistics: Statistics | None) -> None:
        prune_(
            self.small,
            Plan(groups=chosen),
            anatomy=within(self.anatomy, path),
            compensate=self.name,
            statistics=statistics,
            ridge=self.ridge,
        )
        self.recipe = joined(self.recipe, recipe_of(self.small))

    def _added(self, biases: list[str]) -> None:
        new = [name for name in biases if name not in self.recipe.biases]
        self.recipe = self.recipe.model_copy(update={"biases": [*self.recipe.biases, *new]})

    def _write(self, state: dict[str, Tensor]) -> None:
        """Write a part of the small model and take it out of memory."""
        tensors, tied = storable(state)
        self.shards.add(tensors)
        self.tied |= tied
        empty_(self.small, state)

    def finish(self, plan: Plan) -> nn.Module:
        """Write what is in no block, name the files, and say what the small model is.

        Returns:
            The small model's skeleton, without weights.
        """
        rest = self.source.outside(self.anatomy.blocks)
        with self.source.filled(rest):
            state = self.source.model.state_dict(keep_vars=True)
            self._write({name: state[name].detach() for name in rest})
        self.shards.finish()
        mark_as_cut(self.small, self.recipe, plan)
        return self.small


def joined(first: Recipe, second: Recipe) -> Recipe:
    """What both changed; where they name the same thing, the second's word holds."""
    attributes = {(path, name): value for path, name, value in (*first.attributes, *second.attributes)}
    return Recipe(
        shapes={**first.shapes, **second.shapes},
        attributes=[(path, name, value) for (path, name), value in attributes.items()],
        headwise=list(dict.fromkeys([*first.headwise, *second.headwise])),
        rewritten=list({**dict(first.rewritten), **dict(second.rewritten)}.items()),
        biases=list(dict.fromkeys([*first.biases, *second.biases])),
    )
