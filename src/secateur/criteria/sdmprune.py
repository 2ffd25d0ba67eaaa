"""`sdmprune`: weight x gradient of the self-distillation loss, after a sliver was cut.

Source: SDMPrune (visresearch, 2025): I_k = mean over d of the sum over examples of |g_kd dL/dg_kd + u_kd dL/du_kd +
down_dk dL/ddown_dk|. The divergence from the model's own prediction is flat at the uncut model, so a sliver is cut
first. The published loss mixes in some cross-entropy: option `loss` takes another one. Groups whose weights differ in
layout (query heads beside fewer key/value heads) have no sum element by element: there the absolute values are added.

Options: loss ("kl").
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion


@criterion("sdmprune", losses=("kl",), weights=("kl",), options=("loss",))
def sdmprune(view: GroupView) -> Tensor:
    """[U]: the saliency of a unit's weights, added element by element."""
    loss = str(view.option("loss", "kl"))
    sums = view.weight_sums(loss)
    joint = {} if view.statistics is None else view.statistics.joint.get(loss, {})
    if view.group.name in joint:
        return joint[view.group.name]
    return torch.stack([s.first for s in sums.values()]).sum(0)
