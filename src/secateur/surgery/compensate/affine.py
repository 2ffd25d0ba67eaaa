"""`affine`: removed units are regressed on kept ones and a constant; the constant goes into the bias.

Source: CORP (arXiv 2602.05243); the centred least squares solution of which mean folding, GRAIL and the OBS update are
special cases: A = S_PK (S_KK + lam I)^-1 with S the covariance,
    W' = W_K + W_P A,  b' = b + W_P (mu_P - A mu_K).
"""

import torch
from torch import Tensor

from secateur.surgery.compensate.base import compensator
from secateur.surgery.compensate.ridge import fold, regression
from secateur.surgery.layer import LayerCut


@compensator("affine")
def affine(cut: LayerCut, weight_NDS: Tensor) -> tuple[Tensor, Tensor]:
    """Fold the centred regression into the kept rows and the bias."""
    sums, alive = cut.need(), cut.alive
    a_KP = regression(sums.covariance, alive, cut.ridge)
    mu = sums.mean.double()
    constant_P = mu[~alive] - mu[alive] @ a_KP
    return fold(weight_NDS, alive, a_KP), torch.einsum("p,pds->d", constant_P, weight_NDS[~alive])
