"""Values of each head in the basis in which the output projection needs the fewest of them.

Source: MoDeGPT (arXiv 2408.09632), type III. With C = E[x x^T] of the attention's input, the SVDs
C^(1/2) Wv^T = U S V^T and S V^T Wo^T = U' S' V'^T give Wv'^T = Wv^T A and Wo'^T = A^-1 Wo^T with A = V S^-1 U': values
become white, and the columns of Wo come out orthogonal and sorted, so that dropping the last dimensions is the best
approximation of rank r. V and S^2 are eigenvectors and eigenvalues of E[v v^T] = Wv C Wv^T, which is what is collected
(a bias of the projection is in it as well). Query heads that share a value head share A; where the paper stops at the
first SVD for them, the second is taken of their output projections side by side.

Shapes: G value heads, H query heads, V dimensions of a head, N inputs and D outputs of projections.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.anatomy.types import PrunableGroup
from secateur.errors import AnatomyError
from secateur.nn.params import get_tensor
from secateur.surgery.recipe import Recipe


@torch.no_grad()
def rotate_values_(model: nn.Module, group: PrunableGroup, moment: Tensor) -> Recipe:
    """Change the basis of one layer's values in place.

    Args:
        group: of kind VO_DIM.
        moment: [G V, G V], sum of v v^T over tokens.

    Returns:
        What changed in the structure: nothing.

    Raises:
        AnatomyError: the heads of values and of the output do not match.
    """
    size = group.size
    makers = [s for s in group.slots if s.role != "consumer"]
    readers = [s for s in group.slots if s.role == "consumer"]
    heads, queries = len(moment) // size, sum(int((s.units >= 0).sum()) for s in readers) // size
    if (
        len(readers) != 1
        or queries % heads
        or any(not torch.equal(s.units, s.units[:size].repeat(heads)) for s in makers)
    ):
        raise AnatomyError(f"the values of '{group.owner}' are not laid out head by head; they cannot be rotated")
    reader = readers[0]
    out = get_tensor(model, reader.name)
    out_GHVD = out.double().cpu().movedim(reader.axis, 0).reshape(heads, queries // heads, size, -1)
    blocks_GVV = torch.stack([moment[g * size :][:size, g * size :][:, :size] for g in range(heads)]).double()
    bases = [basis(block, out_HVD) for block, out_HVD in zip(blocks_GVV, out_GHVD, strict=True)]
    a_GVV, inverse_GVV = (torch.stack(each) for each in zip(*bases, strict=True))
    new = torch.einsum("guv,ghvd->ghud", inverse_GVV, out_GHVD).reshape(queries * size, -1)
    out.copy_(new.reshape(out.movedim(reader.axis, 0).shape).movedim(0, reader.axis).to(out))
    for slot in makers:
        made = get_tensor(model, slot.name)
        made_GVN = made.double().cpu().movedim(slot.axis, 0).reshape(heads, size, -1)
        new = torch.einsum("gvu,gvn->gun", a_GVV, made_GVN).reshape(made.movedim(slot.axis, 0).shape)
        made.copy_(new.movedim(0, slot.axis).to(made))
    return Recipe()


def basis(second_VV: Tensor, out_HVD: Tensor) -> tuple[Tensor, Tensor]:
    """A and its inverse [V, V]: values in the new basis are A^T v.

    Args:
        second_VV: second moment of the head's values.
        out_HVD: transposed output projections of the query heads that read them.
    """
    squares_V, v_VV = torch.linalg.eigh(second_VV / second_VV.diagonal().mean().clamp_min(1e-30))
    s_V = squares_V.clamp_min(1e-6 * float(squares_V.max())).sqrt()
    together = torch.cat(list(s_V[:, None] * v_VV.T @ out_HVD), dim=1)
    u_VV = torch.linalg.svd(together, full_matrices=False).U
    if u_VV.shape[1] < len(s_V):  # fewer outputs than dimensions: any completion will do
        u_VV = torch.linalg.qr(torch.cat([u_VV, torch.eye(len(s_V), dtype=u_VV.dtype)], 1)).Q
    return (v_VV / s_V) @ u_VV, u_VV.T @ (s_V[:, None] * v_VV.T)
