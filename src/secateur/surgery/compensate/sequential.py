"""`sequential`: `affine` first; then, block by block, every layer that writes into the residual stream is refit on what
the already cut network gives it, so that the stream comes back to where the dense network has it.

The work is in `secateur.surgery.sequential`; this is its first step.
"""

from torch import Tensor

from secateur.surgery.compensate.affine import affine
from secateur.surgery.compensate.base import compensator
from secateur.surgery.layer import LayerCut


@compensator("sequential", sequential=True)
def sequential(cut: LayerCut, weight_NDS: Tensor) -> tuple[Tensor, Tensor]:
    """The affine fold where statistics are at hand, else the weight as it is: a starting point and a prior."""
    if cut.sums is None or cut.sums.outer.numel() == 0:
        return weight_NDS, weight_NDS.new_zeros(weight_NDS.shape[1])
    return affine(cut, weight_NDS)
