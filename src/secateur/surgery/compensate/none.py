"""`none`: plain slices, what most published code does."""

from torch import Tensor

from secateur.surgery.compensate.base import compensator
from secateur.surgery.layer import LayerCut


@compensator("none", data=False)
def none(cut: LayerCut, weight_NDS: Tensor) -> tuple[Tensor, Tensor]:
    """The weight as it is."""
    return weight_NDS, weight_NDS.new_zeros(weight_NDS.shape[1])
