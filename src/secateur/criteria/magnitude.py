"""`magnitude`: norm of everything a unit owns, producer times consumer. Needs no data.

Source: Han et al. 2015, Li et al. 2017 (arXiv 1608.08710), in the symmetric form: scaling a ReLU unit's producer up and
its consumer down changes nothing, and leaves the product of the norms as it is.
"""

from torch import Tensor

from secateur.criteria.base import GroupView, criterion


@criterion("magnitude", data=False)
def magnitude(view: GroupView) -> Tensor:
    """[U]: ||producer rows|| * ||consumer columns||."""
    return view.producer_rows().norm(dim=1) * view.consumer_rows().norm(dim=1)
