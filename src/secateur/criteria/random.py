"""`random`: the baseline that every criterion must beat."""

import zlib

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion


@criterion("random", data=False)
def random(view: GroupView) -> Tensor:
    """[U]: uniform numbers, the same for the same seed and group."""
    seed = zlib.crc32(view.group.name.encode()) + view.seed
    return torch.rand(view.size, generator=torch.Generator().manual_seed(seed))
