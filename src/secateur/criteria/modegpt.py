"""`modegpt`: the selections of MoDeGPT's three kinds of modules.

Source: MoDeGPT (arXiv 2408.09632). Type I, neurons and whole heads: ridge leverage scores, as `leverage`. Type II,
query/key dimensions: the CR approximation of a product of two matrices, sqrt(E[q_i^2] E[k_i^2]); a rotary embedding
turns dimensions i and i + d/2 into one another, so the energies of such a pair are added, which makes the score the
same before and after it; scores are added over the heads of a layer. Type III, value dimensions: the leading ones of
the basis into which `secateur.rotate` brought them. (The residual width, which MoDeGPT leaves, goes the same way.)

Options: ridge (of the leverage scores, relative to the mean diagonal, 1e-2).
"""

from torch import Tensor

from secateur.anatomy.types import Kind
from secateur.criteria.base import GroupView, criterion
from secateur.criteria.leverage import leverage
from secateur.criteria.order import order
from secateur.errors import DataError


@criterion("modegpt", covariance=True, moments=True, options=("ridge",))
def modegpt(view: GroupView) -> Tensor:
    """[U]: by the group's kind."""
    if view.group.kind in (Kind.VO_DIM, Kind.RESIDUAL):
        return order(view)
    return products(view) if view.group.kind is Kind.QK_DIM else leverage(view)


def products(view: GroupView) -> Tensor:
    """[U]: the summed products of what queries and keys hold of each unit."""
    held = {} if view.statistics is None else view.statistics.moments
    slots = [s for s in view.group.slots if s.role == "producer"]
    keys = [f"{view.group.name}@{s.name.rpartition('.')[0]}" for s in slots]
    if len(slots) != 2 or view.group.narrowing is None or not all(key in held for key in keys):
        raise DataError(f"no statistics of queries and keys for '{view.group.name}'; calibrate the rotated model")
    size = view.group.narrowing.size
    few, many = sorted((_by_head(held[k], s.units[:size]) for k, s in zip(keys, slots, strict=True)), key=len)
    return (few.repeat_interleave(len(many) // len(few), 0) * many).sqrt().sum(0)


def _by_head(squares: Tensor, units: Tensor) -> Tensor:
    """[H, U]: energy of each unit in each head.

    Args:
        squares: [H * size], sum of squares of every feature.
        units: [size], of one head's features.
    """
    rows = squares.reshape(-1, len(units))
    return rows.new_zeros(len(rows), int(units.max()) + 1).index_add_(1, units, rows)
