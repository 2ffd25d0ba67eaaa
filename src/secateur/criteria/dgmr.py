"""`dgmr`: diversity of the producer rows by pivoted Gram-Schmidt. Needs no data.

Source: DGMR (arXiv 2506.08591). Take the row with the largest residual norm, project every other row off it, repeat:
column-pivoted QR of the transposed weight. The rows span at most as many directions as the layer has inputs; beyond
that the procedure starts again on the rows not yet taken.
"""

import torch
from torch import Tensor

from secateur.criteria.base import GroupView, criterion


@criterion("dgmr", data=False)
def dgmr(view: GroupView) -> Tensor:
    """[U]: U for the first row taken, down to 1 for the last."""
    order = gram_schmidt_order(view.producer_rows())
    scores = torch.empty(view.size)
    scores[order] = torch.arange(view.size, 0, -1, dtype=torch.float32)
    return scores


def gram_schmidt_order(rows_UR: Tensor) -> Tensor:
    """Order in which pivoted Gram-Schmidt takes the rows of a matrix, starting again whenever its rank is used up.

    Args:
        rows_UR: [U, R].

    Returns:
        int64 [U], a permutation.
    """
    from scipy.linalg import qr

    left = torch.arange(rows_UR.shape[0])
    taken = []
    while len(left):
        matrix = rows_UR[left].double().T.numpy()  # [R, left]
        rank = min(matrix.shape)
        _, pivots = qr(matrix, mode="r", pivoting=True)
        chosen = torch.from_numpy(pivots[:rank].astype("int64"))
        taken.append(left[chosen])
        rest = torch.ones(len(left), dtype=torch.bool)
        rest[chosen] = False
        left = left[rest]
    return torch.cat(taken)
