"""`ridge`: removed units are regressed on kept ones, through the origin; no bias is needed.

Source: GRAIL (CPAL 2026) and the Nystrom form of MoDeGPT (arXiv 2408.09632): with G = E[h h^T],
    W' = W_K + W_P A,  A = G_PK (G_KK + lam I)^-1,  lam = ridge * mean diag G_KK.
"""

import torch
from torch import Tensor

from secateur.linalg import damped_cholesky
from secateur.surgery.compensate.base import compensator
from secateur.surgery.layer import LayerCut


@compensator("ridge")
def ridge(cut: LayerCut, weight_NDS: Tensor) -> tuple[Tensor, Tensor]:
    """Fold the uncentred regression into the kept rows."""
    a_KP = regression(cut.need().second_moment.double(), cut.alive, cut.ridge)
    return fold(weight_NDS, cut.alive, a_KP), weight_NDS.new_zeros(weight_NDS.shape[1])


def regression(moment: Tensor, alive: Tensor, lam: float) -> Tensor:
    """[K, P]: coefficients that express the removed features by the kept ones.

    Args:
        moment: [N, N], second moment or covariance.
        alive: bool [N].
        lam: ridge, relative to the mean diagonal of the kept part.
    """
    factor = damped_cholesky(moment[alive][:, alive], max(lam, 1e-9))
    return torch.cholesky_solve(moment[alive][:, ~alive], factor)


def fold(weight_NDS: Tensor, alive: Tensor, a_KP: Tensor) -> Tensor:
    """W' with row k = W_k + sum over p of a_kp W_p."""
    out = weight_NDS.clone()
    out[alive] += torch.einsum("kp,pds->kds", a_KP, weight_NDS[~alive])
    return out
