"""The whole job on a model that need not fit into memory: at most two forward passes over its blocks.

load block -> all hidden states through it -> sums -> scores -> (allocation) -> cut -> refit -> write -> forget.

Allocators that look at sizes alone are done in one pass: a block is cut when its statistics are there. For the others a
first pass keeps nothing but scores and error curves, and a second one cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.allocation import allocate, allocators
from secateur.allocation.base import best_units
from secateur.anatomy import Anatomy
from secateur.artifact import load
from secateur.artifact.save import describe
from secateur.artifact.weights import Shards
from secateur.calibration import Statistics
from secateur.criteria import Scores, criteria
from secateur.data import Batches
from secateur.errors import AnatomyError
from secateur.files import atomic_folder
from secateur.models import TextSpec
from secateur.plan import Budget, Kept, Plan
from secateur.result import Result, Settings, table
from secateur.steps import Steps
from secateur.streaming.budget import STATES, check_fits, parse_bytes
from secateur.streaming.cutting import Cutter, Decide
from secateur.streaming.model import Streamed, stack_of, within
from secateur.streaming.sums import score_block, score_blocks
from secateur.streaming.tail import compare
from secateur.streaming.walk import States, Walk
from secateur.surgery import compensators


@dataclass
class Job:
    """One streamed compression.

    Attributes:
        source: the dense model.
        anatomy: of it.
        calibration, held_out: disjoint data.
        settings: as asked.
    """

    source: Streamed
    anatomy: Anatomy
    calibration: Batches
    held_out: Batches
    settings: Settings

    def run(self, budget: Budget, steps: Steps, out: Path) -> Result:
        """Score, allocate, cut and compare, and write the small model.

        Raises:
            SecateurError: the memory budget is too small, or the model cannot be taken block by block.
        """
        stack_of(self.anatomy, self.source.model)
        self._check_room()
        one_pass = allocators.get(self.settings.allocator).blind
        if one_pass:
            plan = self._allocate(self._sizes(), budget)
        else:
            scores = steps.keep("scores.safetensors", Scores, self._scores)
            plan = steps.keep("plan.json", Plan, lambda: self._allocate(scores, budget))
        chosen: dict[str, Kept] = {}

        def decide(path: str, statistics: Statistics | None) -> dict[str, Kept]:
            here = {n: plan.groups[n] for n in within(self.anatomy, path).groups if n in plan.groups}
            if one_pass:
                s = self.settings
                values = score_block(self.source, self.anatomy, path, statistics, s.criterion, seed=s.seed).values
                here = {
                    name: kept.model_copy(update={"keep": best_units(values[name], len(kept.keep))})
                    for name, kept in here.items()
                    if name in values
                }
            chosen.update(here)
            return here

        with atomic_folder(out) as folder:
            result, tied = self._cut(plan, decide, chosen, Shards(folder), one_pass)
            describe(result.model, folder, tied, result.figures())
        result.model = load(out)
        result.reused = steps.reused
        return result

    def _cut(
        self, plan: Plan, decide: Decide, chosen: dict[str, Kept], shards: Shards, one_pass: bool
    ) -> tuple[Result, dict[str, str]]:
        s = self.settings
        rule, refit = criteria.get(s.criterion), compensators.get(s.compensator)
        needed = refit.data or refit.sequential or (one_pass and rule.data)
        walk = self._walk(self.calibration, "calibration") if needed else None
        held = self._walk(self.held_out, "held-out")
        cutter = Cutter(self.source, self.anatomy, shards, s.compensator, s.ridge)
        needs = {
            "covariance": refit.data or (one_pass and rule.covariance),
            "projected": one_pass and rule.projected,
        }
        cutter.run(decide, walk, held, **needs)
        del walk
        plan = plan.model_copy(update={"groups": dict(chosen)})
        small = cutter.finish(plan)
        found = compare(self.source, small, self.held_out, held, "cut held-out")
        done = Result(small, plan, found, self._apart, [], settings=s)
        done.table = table(self.source.model, small, {})
        return done, cutter.tied

    @property
    def _apart(self) -> bool:
        return self.held_out is not self.calibration

    def _walk(self, data: Batches, name: str) -> Walk:
        """Before the first block."""
        states = States(int(parse_bytes(str(self.settings.memory_budget)) * STATES / 2))
        with self.source.filled(self.source.outside(self.anatomy.blocks)):
            return Walk(self.source.model, self.anatomy.blocks, data, states, name, self.settings.dtype)

    def _scores(self) -> Scores:
        s, rule = self.settings, criteria.get(self.settings.criterion)
        curves = allocators.get(s.allocator).curves
        walk = self._walk(self.calibration, "calibration") if rule.data or curves else None
        return score_blocks(self.source, self.anatomy, walk, s.criterion, curves=curves, seed=s.seed)

    def _sizes(self) -> Scores:
        """Stand-ins for the scores where only their number matters."""
        rule = criteria.get(self.settings.criterion)
        inside = {n: g for path in self.anatomy.blocks for n, g in within(self.anatomy, path).groups.items()}
        values = {n: torch.zeros(g.size) for n, g in inside.items() if g.consumers or not rule.data}
        if not values:
            raise AnatomyError("no block of this model has a group that can be cut; `secateur inspect` says why")
        meta = {"criterion": self.settings.criterion, "options": {}, "fingerprint": self.source.fingerprint()}
        return Scores(values, meta=meta, anatomy=self.anatomy)

    def _allocate(self, scores: Scores, budget: Budget) -> Plan:
        s = self.settings
        return allocate(
            scores,
            budget,
            s.allocator,
            anatomy=self.anatomy,
            kinds=s.kinds,
            floor=s.floor,
            align=s.align,
            uniform_width=s.uniform_width,
            model_name=str(self.source.checkpoint.folder),
        )

    def _check_room(self) -> None:
        s, spec = self.settings, self.calibration.spec
        tokens = s.window * max(self.calibration.size, self.held_out.size) if isinstance(spec, TextSpec) else 0
        check_fits(
            self.source,
            self.anatomy,
            parse_bytes(str(s.memory_budget)),
            criterion=s.criterion,
            compensator=s.compensator,
            curves=allocators.get(s.allocator).curves,
            logits=tokens * (spec.vocabulary if isinstance(spec, TextSpec) else 0),
        )
