"""Second moments that only rotations need: of the residual stream, of what values are made from, of queries and keys.

Shapes: T tokens, D width of the stream, N inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Kind, PrunableGroup
from secateur.nn.stream import normalised
from secateur.nn.trees import tensors_in


class MomentWatch:
    """Adds up the sums of one model; enter `watching` around each forward pass.

    Args:
        model: the dense model.
        anatomy: its groups, those that cannot be cut yet included.
        kinds: of the groups to watch.

    Attributes:
        sums: by group name. RESIDUAL: [D, D], the stream as each of its norms sees it, scaled to root mean square 1,
            summed over all norms.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, kinds: Collection[str]) -> None:
        self.model, self.sums = model, dict[str, Tensor]()
        self.groups = [g for g in anatomy.groups.values() if str(g.kind) in set(map(str, kinds))]

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for group in self.groups:
            if group.kind is Kind.RESIDUAL:
                for norm in group.stream.norms:

                    def before(_module, args, kwargs, group=group, centred=norm.centred):
                        self._add(group, normalised(next(tensors_in((args, kwargs))), centred))

                    module = self.model.get_submodule(norm.module)
                    handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, group: PrunableGroup, x: Tensor, suffix: str = "") -> None:
        x_TN = x.detach().flatten(0, -2).float()
        key, value = group.name + suffix, (x_TN.T @ x_TN).cpu()
        self.sums[key] = self.sums[key] + value if key in self.sums else value
