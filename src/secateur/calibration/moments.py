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
            summed over all norms. VO_DIM: [N, N], what the projection to values gives. QK_DIM, with the name of a
            projection: [N], the squares of what it gives.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, kinds: Collection[str]) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}
        wanted = {*map(str, kinds), *(str(Kind.QK_DIM) for g in anatomy.cuttable.values() if g.kind is Kind.QK_DIM)}
        self.groups = [g for g in anatomy.groups.values() if str(g.kind) in wanted]

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
            elif group.kind in (Kind.QK_DIM, Kind.VO_DIM):
                for slot in group.slots:
                    if slot.role == "producer":
                        path = slot.name.rpartition(".")[0]

                        def after(_module, _args, out, group=group, units=slot.units, path=path):
                            self._made(group, out[..., units >= 0], path)

                        handles.append(self.model.get_submodule(path).register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _made(self, group: PrunableGroup, out: Tensor, path: str) -> None:
        """Queries, keys or values."""
        if group.kind is Kind.VO_DIM:
            self._add(group, out)
        else:
            self._sum(f"{group.name}@{path}", out.detach().flatten(0, -2).float().square().sum(0))

    def _add(self, group: PrunableGroup, x: Tensor) -> None:
        x_TN = x.detach().flatten(0, -2).float()
        self._sum(group.name, x_TN.T @ x_TN)

    def _sum(self, key: str, value: Tensor) -> None:
        value = value.cpu()
        self.sums[key] = self.sums[key] + value if key in self.sums else value
