"""`cfsp`: weights relative to the other units', times the activation norm; the fine score of CFSP.

Source: CFSP (COLING 2025, arXiv 2409.13199): S_ij = (relative |down| n + relative |up| + relative |gate|) n_j, n_j the
root mean square of h_j, averaged over i. The released code divides by sums over i, over which it then averages, so that
its score is the activation norm alone; here weights are relative to those of the other units (sums over j), which keeps
what the formula is for. Option norm="released" gives the collapsed score. The coarse part is the allocator `cfsp`.

Options: norm ("units" or "released").
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion, need
from secateur.errors import DataError


@criterion("cfsp", options=("norm",))
def cfsp(view: GroupView) -> Tensor:
    """[U]: relative weights of all layers of the group, times the activation norm."""
    how = str(view.option("norm", "units"))
    if how not in ("units", "released"):
        raise DataError(f"norm '{how}' is not known; use units or released")
    norm, terms = torch.zeros(view.size), torch.zeros(view.size)
    for reading in view.readings():
        sums = need(reading)
        square_N = sums.square / sums.count
        norm += view.per_unit(square_N, reading.units)
        strength_ND = reading.weight.abs() * square_N.sqrt()[:, None]
        terms += view.per_unit((strength_ND / strength_ND.sum(0).clamp_min(1e-30)).mean(1), reading.units)
    norm = norm.sqrt()
    if how == "released":
        return norm
    for rows_UR in view.producers():
        weight_UR = rows_UR.abs()
        terms += (weight_UR / weight_UR.sum(0).clamp_min(1e-30)).mean(1)
    return terms * norm
