"""`amp-llm`: attention heads and neurons by their projected activations.

Source: AMP for language models (arXiv 2504.21174; not the vision method `amp`). A head scores the mean over tokens of
|| W_k a_k ||_1, a_k being its slice of the output projection's input. For neurons the released code takes the mean of
|h_j| alone; the exact analogue of the head's score is that times || W_j ||_1, the default here.

Options: neurons ("weighted" or "released").
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion, need
from secateur.errors import DataError


@criterion("amp-llm", projected=True, options=("neurons",))
def amp_llm(view: GroupView) -> Tensor:
    """[U]: mean L1 norm of what a unit adds to the output."""
    neurons = str(view.option("neurons", "weighted"))
    if neurons not in ("weighted", "released"):
        raise DataError(f"neurons '{neurons}' is not known; use weighted or released")
    out = torch.zeros(view.size)
    for reading in view.readings():
        sums = need(reading)
        several = int(torch.bincount(reading.units[reading.units >= 0]).max()) > 1
        key = f"{view.group.name}@{reading.consumer.module}"
        if not several:
            norm = reading.weight.abs().sum(1) if neurons == "weighted" else 1.0
            out += view.per_unit(sums.absolute / sums.count * norm, reading.units)
        elif view.statistics is not None and key in view.statistics.projected:
            out += view.statistics.projected[key] / sums.count
        else:
            raise DataError(f"these statistics hold no projections of the heads at '{key}': calibrate, projected=True")
    return out
