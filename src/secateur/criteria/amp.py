"""`amp`: entropy-Taylor, the criterion of AMP.

Source: Adaptive MLP Pruning (arXiv 2603.08100): E is the mean entropy of the in-batch softmax over CLS similarities,
and a neuron's score is the mean over images of | sum over tokens of h_j * dE/dh_j |.
"""

from torch import Tensor

from secateur.criteria.base import GroupView, criterion


@criterion("amp", losses=("entropy",))
def amp(view: GroupView) -> Tensor:
    """[U]: sum over images of |sum over tokens of h * dE/dh|."""
    return view.taylor("entropy").sample
