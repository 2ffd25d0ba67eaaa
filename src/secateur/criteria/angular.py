"""`angular`: the mean angle by which a block turns the residual stream.

Source: Gromov et al. (arXiv 2403.17887): of all runs of n blocks the one with the smallest angular distance
arccos(cos(x_i, x_i+n)) / pi goes. Which run that is depends on n, so the choice is the allocator's (`contiguous`).
"""

from torch import Tensor

from secateur.criteria.base import GroupView, block_criterion


@block_criterion("angular")
def angular(view: GroupView) -> Tensor:
    """[U + 1, U + 1]: mean angle between the stream at two places, in units of pi."""
    sums, places = view.stream()
    return sums.angle[places][:, places] / sums.count
