"""The sequential refit of one block at a time: the same regressions as `secateur.surgery.sequential`, on hidden states
that are walked along instead of read again from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch
from torch import Tensor

from secateur.anatomy import Anatomy
from secateur.models import example_input
from secateur.plan import Plan
from secateur.replay import Spool, Stop, grabbed
from secateur.streaming.model import Streamed, within
from secateur.streaming.walk import Walk
from secateur.surgery.cut import check_plan, tensor_masks
from secateur.surgery.sequential import Target, point_of, refit_layer, targets_of


class BlockRefit:
    """Refits the layers of each cut block on what the cut model before it delivers.

    Args:
        source: the dense model.
        small: the skeleton of the cut one.
        anatomy: of the dense model.
        walk: of the calibration data, before the first block; it carries the cut model's hidden states under "cut".
    """

    def __init__(self, source: Streamed, small: torch.nn.Module, anatomy: Anatomy, walk: Walk) -> None:
        self.source, self.small, self.anatomy, self.walk = source, small, anatomy, walk
        self.spool = Spool()
        self.block = 0
        self.targets = targets_of(source.model, anatomy, example_input(source.model))
        for index in walk:
            walk.states.put(("cut", index), walk.states.get((walk.name, index)))

    def _here(self, block: int) -> list[Target]:
        inside = f"{self.walk.blocks[block]}."
        return [t for t in self.targets if t.consumer.module.startswith(inside) and t.stage == block]

    def watch(self, block: int) -> Callable[[int, Callable[[], Tensor]], Tensor]:
        """For `collect`: note what the dense block shows at the points that the refit aims at."""
        targets = self._here(block)

        def look(index: int, step: Callable[[], Tensor]) -> Tensor:
            found: list[list[Tensor]] = [[] for _ in targets]
            with ExitStack() as stack:
                for target, into in zip(targets, found, strict=True):
                    path, side, which = point_of(target)
                    stack.enter_context(grabbed(self.source.model.get_submodule(path), side, which, into))
                hidden = step()
            for target, seen in zip(targets, found, strict=True):
                self.spool.put((target.consumer.module, index), seen[0])
            return hidden

        return look

    @torch.no_grad()
    def refit(self, block: int, plan: Plan) -> list[str]:
        """Refit a cut block in place and send the cut model's hidden states through it.

        Args:
            plan: that the block was cut by.

        Returns:
            Names of biases that were added.
        """
        path = self.walk.blocks[block]
        masks = tensor_masks(check_plan(self.source.model, plan, within(self.anatomy, path)))
        self.block = block
        added = []
        for target in self._here(block):
            outputs = masks.get(target.consumer.weight, {}).get(1 - target.consumer.axis)
            added += refit_layer(self.small, replace(target, outputs=outputs), self, None, 0.5, True)
        self.walk.advance(block, self.small.get_submodule(path), name="cut")
        return added

    # -- what `refit_layer` asks of what runs the model -----------------------------------------------------------

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """Index of every batch, and a tensor whose first axis is as long as the batch."""
        for index in self.walk:
            yield index, torch.empty(self.walk.sizes[index], device="meta")

    def run(
        self, which: str, stage: int, index: int, batch: Tensor, points: list[tuple], *, keep: bool
    ) -> list[Tensor]:
        """What the cut block shows at some points on a batch; it ends at the last of them."""
        found: list[list[Tensor]] = [[] for _ in points]
        with ExitStack() as stack:
            for point, into in zip(points, found, strict=True):
                path, side, place = point
                last = not keep and point is points[-1]
                stack.enter_context(grabbed(self.small.get_submodule(path), side, place, into, stop=last))
            stack.enter_context(suppress(Stop))
            self.walk.step(self.block, index, self.small.get_submodule(self.walk.blocks[self.block]), name="cut")
        return [tensors[0] for tensors in found]
