"""The residual stream in the basis of its principal components; the function of the model stays what it is.

Source: SliceGPT (arXiv 2401.15024). Norm weights are folded into what reads the norm, a subtracted mean into what
writes the stream, LayerScale into the layer before it; then every weight that writes or reads the stream is multiplied
by Q. One Q serves the whole model (SliceGPT has one for each block, and a dense matrix in every skip to take one basis
to the next), so after the cut the model is an ordinary one of smaller width. Q comes from the stream as the norms see
it, all norms counting alike.

A head tied to the embedding cannot take the last norm's weights g in: Q^T diag(g) Q follows that norm as a matrix
(D x D beside a vocabulary x D), so that the two stay tied. Where the mean is folded, they are untied instead.

Shapes: D width of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Consumer, PrunableGroup, Slot
from secateur.errors import AnatomyError
from secateur.nn.params import get_tensor, set_tensor
from secateur.nn.stream import MIX, StreamNorm, mix_, uncentre_
from secateur.surgery.layer import add_to_bias_
from secateur.surgery.recipe import Recipe


def principal_axes(moment: Tensor) -> Tensor:
    """[D, D]: eigenvectors of a second moment in its columns, the largest eigenvalue first."""
    return torch.linalg.eigh(moment.double()).eigenvectors.flip(-1)


@torch.no_grad()
def rotate_residual_(model: nn.Module, group: PrunableGroup, moment: Tensor) -> Recipe:
    """Rotate the stream in place.

    Args:
        group: of kind RESIDUAL.
        moment: [D, D], second moment of the normalised stream.

    Returns:
        What changed in the structure.

    Raises:
        AnatomyError: a norm subtracts the mean and is no layer norm.
    """
    q_DD, recipe = principal_axes(moment), Recipe()
    norms, slots = group.stream.norms, {s.name: s for s in group.slots}
    _fold_scales(model, group, slots)
    for norm in norms:
        _fold_norm(model, norm, slots, q_DD, recipe)
    parts = {name for norm in norms for name in (norm.weight, norm.bias, f"{norm.module}.{MIX}")}
    parts |= {scale for _, scale in group.stream.scales}
    readers = {name for norm in norms for name in norm.readers}
    centred, done = any(norm.centred for norm in norms), set[int]()
    for slot in group.slots:
        tensor = get_tensor(model, slot.name)
        if slot.name in parts or id(tensor) in done:
            continue
        done.add(id(tensor))
        value = tensor.double().movedim(slot.axis, -1)
        if centred and slot.name not in readers:
            value = value - value.mean(-1, keepdim=True)
        tensor.copy_((value @ q_DD.to(value)).movedim(-1, slot.axis))
    for norm in norms:
        if norm.centred:
            if not uncentre_(model.get_submodule(norm.module)):
                raise AnatomyError(f"'{norm.module}' subtracts the mean and is no nn.LayerNorm; it cannot be rotated")
            recipe.uncentred.append(norm.module)
    return recipe


def _fold_scales(model: nn.Module, group: PrunableGroup, slots: dict[str, Slot]) -> None:
    """Multiply LayerScales into the weights and biases before them, and leave ones."""
    for weight, scale in group.stream.scales:
        gamma = get_tensor(model, scale).flatten()
        bias = f"{weight.rpartition('.')[0]}.bias"
        for name in (weight, *([bias] if bias in slots else [])):
            get_tensor(model, name).movedim(slots[name].axis, -1).mul_(gamma)
    for scale in {scale for _, scale in group.stream.scales}:
        get_tensor(model, scale).fill_(1)


def _fold_norm(model: nn.Module, norm: StreamNorm, slots: dict[str, Slot], q_DD: Tensor, recipe: Recipe) -> None:
    """Move a norm's scale and bias into its readers."""
    scale_D = norm.scale(model).cpu()
    tied = [n for n in norm.readers if sum(get_tensor(model, n) is get_tensor(model, m) for m in slots) > 1]
    if norm.centred:
        for name in tied:
            set_tensor(model, name, get_tensor(model, name).detach().clone())
        tied = []
    if norm.bias:
        bias_D = get_tensor(model, norm.bias).double()
        for name in norm.readers:
            weight = get_tensor(model, name).double().movedim(slots[name].axis, -1)
            if float(bias_D.abs().max()) > 0:
                recipe.biases.extend(_add_to_bias(model, slots[name], weight @ bias_D))
        get_tensor(model, norm.bias).zero_()
    if tied and float((scale_D - scale_D.mean()).abs().max()) > 0:
        mix_(model.get_submodule(norm.module), q_DD.T @ (scale_D[:, None] * q_DD))
        recipe.mixed.append(norm.module)
    else:
        for name in norm.readers:
            get_tensor(model, name).movedim(slots[name].axis, -1).mul_(scale_D.to(get_tensor(model, name)))
    norm.set_scale_(model, 1.0)


def _add_to_bias(model: nn.Module, slot: Slot, shift: Tensor) -> list[str]:
    path, _, leaf = slot.name.rpartition(".")
    if leaf == "in_proj_weight":
        get_tensor(model, f"{path}.in_proj_bias").add_(shift.to(get_tensor(model, slot.name)))
        return []
    name = add_to_bias_(model, Consumer(path, slot.name, slot.axis, slot.units), shift, may_add=True)
    return [name] if name else []
