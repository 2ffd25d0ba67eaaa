"""`hfprune`: entropy-Taylor for language models.

Source: HFPrune (visresearch): the loss is the mean entropy of the model's own next-token distribution, and a neuron's
score the sum over tokens of |h_j * dE/dh_j| at the input of the down projection. For a classifier the entropy is that
of its class distribution.
"""

from torch import Tensor

from secateur.criteria.base import GroupView, criterion


@criterion("hfprune", losses=("logits-entropy",))
def hfprune(view: GroupView) -> Tensor:
    """[U]: sum over tokens of |h * dE/dh|."""
    return view.taylor("logits-entropy").token
