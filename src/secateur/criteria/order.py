"""`order`: the first unit is worth most.

For models that `secateur.rotate` has prepared: their bases are sorted, so what is kept is the leading part, as SliceGPT
(arXiv 2401.15024) and the SVD of MoDeGPT (arXiv 2408.09632) have it.
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion


@criterion("order", data=False)
def order(view: GroupView) -> Tensor:
    """[U]: falling from 1 to 1 / U."""
    return torch.arange(view.size, 0, -1) / view.size
