"""`llm-pruner`: Taylor saliency of weights, reduced over a unit's rows and over the group's layers.

Source: LLM-Pruner (arXiv 2305.11627). With s = w dL/dw and F the mean squared gradient per example: "vector" is |sum of
s over the row|; "element1" the sum of |s|; "element2" of w^2 F; "mixed" of |s - w^2 F / 2|. The gradient of the
element forms is that of a batch, as published where one batch is all there is (10 texts of 64 tokens).

Options: form ("element1"), reduce over the layers of a group ("sum", "mean", "max", "prod", "first": the first
producer, "last": the consumer), loss ("cross-entropy").
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion
from secateur.errors import DataError

_FORMS = {"vector": "vector", "element1": "first", "element2": "second", "mixed": "mixed"}
_REDUCE = ("sum", "mean", "max", "prod", "first", "last")


@criterion("llm-pruner", losses=("cross-entropy",), weights=("cross-entropy",), options=("form", "reduce", "loss"))
def llm_pruner(view: GroupView) -> Tensor:
    """[U]: the group saliency."""
    form, reduce = str(view.option("form", "element1")), str(view.option("reduce", "sum"))
    if form not in _FORMS or reduce not in _REDUCE:
        raise DataError(
            f"form '{form}', reduce '{reduce}' are not known; use {', '.join(_FORMS)} and {', '.join(_REDUCE)}"
        )
    sums = view.weight_sums(str(view.option("loss", "cross-entropy")))
    s_LU = torch.stack([getattr(s, _FORMS[form]).abs() for s in sums.values()])
    if reduce in ("first", "last"):
        return s_LU[0 if reduce == "first" else -1]
    return s_LU.amax(0) if reduce == "max" else getattr(s_LU, reduce)(0)
