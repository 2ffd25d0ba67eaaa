"""`taylor`: first-order importance, for any loss and aggregation.

Source: Molchanov et al. (arXiv 1611.06440, CVPR 2019). With a gate g_j = 1 on unit j, dL/dg_j = sum over tokens of
h_j * dL/dh_j is the first-order change of the loss when the unit goes. How it is aggregated matters: signs must not
cancel over the set.

Options: loss ("features" by default: the Fisher information of the features), aggregation ("squared" per sample,
"sample" absolute per sample, "token" absolute per token).
"""

from torch import Tensor

from secateur.criteria.base import GroupView, criterion
from secateur.errors import DataError


@criterion("taylor", losses=("features",), options=("loss", "aggregation"))
def taylor(view: GroupView) -> Tensor:
    """[U]: the chosen aggregation of activation x gradient."""
    aggregation = str(view.option("aggregation", "squared"))
    if aggregation not in ("squared", "sample", "token"):
        raise DataError(f"aggregation '{aggregation}' is not known; use squared, sample or token")
    return getattr(view.taylor(str(view.option("loss", "features"))), aggregation)
