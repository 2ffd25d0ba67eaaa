"""The one factorisation that scores, curves and regressions share."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_cholesky(moment: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of a second moment plus `damping` times its mean diagonal.

    Copies, dead units and constants make moments singular to working precision; damping is then raised tenfold until
    the factor exists.

    Args:
        moment: [N, N], symmetric, positive semidefinite up to rounding; float64 for any N that matters.
        damping: relative to the mean diagonal.
    """
    eye = torch.eye(len(moment), dtype=moment.dtype)
    scale = moment.diagonal().mean().clamp_min(1e-12)
    while True:
        factor, failed = torch.linalg.cholesky_ex(moment + damping * scale * eye)
        if not failed:
            return factor
        damping = max(damping * 10, 1e-9)
