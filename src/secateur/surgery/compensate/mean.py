"""`mean`: removed units are replaced by their means, folded into the bias.

Source: FLAP (arXiv 2312.11983) and Variance-Based Pruning (arXiv 2507.12988): b += sum over removed j of mu_j * W_:j.
"""

import torch
from torch import Tensor

from secateur.surgery.compensate.base import compensator
from secateur.surgery.layer import LayerCut


@compensator("mean")
def mean(cut: LayerCut, weight_NDS: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as it is; the bias takes the removed means."""
    gone = ~cut.alive
    mu = cut.need().mean.double()[gone]
    return weight_NDS, torch.einsum("p,pds->d", mu, weight_NDS[gone])
