"""How much the residual stream turns from block to block: what depth pruning and block-wise budgets are made of.

Shapes: L blocks, T tokens of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.nn.trees import tensors_in

_CHUNK = 256  # tokens whose places are in float32 at once


@dataclass
class StreamSums:
    """Sums over tokens between the L + 1 places before, between and after the blocks.

    Attributes:
        count: [], tokens seen; 0 where the stream changes its shape on the way.
        cosine: [L + 1, L + 1], of the stream's vectors at two places.
        angle: [L + 1, L + 1], angles between them, in units of pi.
    """

    count: Tensor
    cosine: Tensor
    angle: Tensor

    @classmethod
    def zeros(cls, blocks: int) -> StreamSums:
        return cls(torch.zeros(()), torch.zeros(blocks + 1, blocks + 1), torch.zeros(blocks + 1, blocks + 1))

    @property
    def turns(self) -> Tensor:
        """[L, 2]: how far each block turns the stream, as 1 - cosine and as an angle in units of pi."""
        return torch.stack([self.influence(), self.influence(angular=True)], 1)

    def influence(self, run: int = 1, *, angular: bool = False) -> Tensor:
        """[L + 1 - run]: mean change over every run of consecutive blocks, 1 - cosine or the angle.

        Sources: block influence of ShortGPT (arXiv 2403.03853); angular distance of arXiv 2403.17887 and CFSP.
        """
        held = self.angle if angular else self.cosine
        mean = torch.diagonal(held, offset=run) / self.count.clamp_min(1)
        return mean if angular else 1 - mean


class StreamWatch:
    """Adds up the sums of one model; enter `watching` around each forward pass.

    Args:
        model: the dense model.
        blocks: paths of its blocks in order of execution.
    """

    def __init__(self, model: nn.Module, blocks: tuple[str, ...]) -> None:
        self.model, self.blocks = model, blocks
        self.sums = StreamSums.zeros(len(blocks))

    @contextmanager
    def watching(self) -> Iterator[None]:
        places: list[Tensor] = []

        def before(_module: nn.Module, args: object, kwargs: object) -> None:
            if not places:
                places.append(next(tensors_in((args, kwargs))).detach())

        def after(_module: nn.Module, _args: object, out: object) -> None:
            places.append(next(tensors_in(out)).detach())

        handles = [self.model.get_submodule(p).register_forward_hook(after) for p in self.blocks]
        for path in self.blocks[:1]:
            handles.append(self.model.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._add(places)

    def _add(self, places: list[Tensor]) -> None:
        if len(places) != len(self.blocks) + 1 or len({tuple(p.shape) for p in places}) > 1 or places[0].dim() < 3:
            return
        tokens = [p.flatten(0, -2) for p in places]
        for start in range(0, len(tokens[0]), _CHUNK):
            unit_LTD = torch.stack([F.normalize(x[start : start + _CHUNK].float(), dim=-1) for x in tokens])
            cosine_TLL = torch.einsum("ltd,mtd->tlm", unit_LTD, unit_LTD).clamp(-1, 1)
            self.sums.cosine += cosine_TLL.sum(0).triu(1).cpu()
            self.sums.angle += cosine_TLL.arccos().sum(0).triu(1).cpu() / torch.pi
        self.sums.count += len(tokens[0])
