"""Rotations: a model that computes the same in a basis in which what matters least comes last, ready to be sliced.

Slicing is then an ordinary Plan: keep the first units of a group. One file a kind of group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Kind, PrunableGroup
from secateur.calibration.statistics import Statistics
from secateur.errors import AnatomyError, DataError
from secateur.nn.attention import explicit_attention
from secateur.nn.trees import tensors_in
from secateur.surgery.cut import mark_as_cut, plan_of, recipe_of
from secateur.surgery.recipe import Recipe
from secateur.surgery.rotation.residual import rotate_residual_
from secateur.surgery.rotation.values import rotate_values_

__all__ = ["ROTATIONS", "rotate"]

# For each kind of group that can be prepared: how to rotate it in place, given its second moment; what that changes in
# the structure comes back.
ROTATIONS: dict[str, Callable[[nn.Module, PrunableGroup, Tensor], Recipe] | None] = {
    str(Kind.RESIDUAL): rotate_residual_,
    str(Kind.VO_DIM): rotate_values_,
    str(Kind.QK_DIM): None,  # rotary embeddings fix the basis; the dimensions can be cut as they are
}

TOLERANCE = 1e-3  # of the largest output; in units of the last place where weights are of half precision
LAST_PLACES = 16


def rotate(
    model: nn.Module, statistics: Statistics, anatomy: Anatomy, kinds: tuple[str, ...], run: Callable[[nn.Module], Any]
) -> nn.Module:
    """A copy of a model, rotated and checked against the model; see `secateur.rotate`.

    Args:
        run: a forward pass on an example.
    """
    out = copy.deepcopy(model)
    recipe = recipe_of(model)
    for kind in kinds:
        groups = [g for g in anatomy.groups.values() if str(g.kind) == kind]
        usable = [g for g in groups if _usable(g)]
        if not usable:
            why = groups[0].reason if groups else "it has none"
            raise AnatomyError(f"no group of kind '{kind}' of this model can be rotated: {why}")
        turn = ROTATIONS[kind]
        for group in usable:
            if turn is None:
                continue
            if group.name not in statistics.moments:
                raise DataError(f"the statistics hold no moments of '{group.name}'; calibrate with moments=('{kind}',)")
            recipe = recipe.then(turn(out, group, statistics.moments[group.name]))
    recipe = recipe.then(Recipe(rotated=list(kinds)))
    _check(model, out, run)
    mark_as_cut(out, recipe, plan_of(model))
    return out


def _usable(group: PrunableGroup) -> bool:
    return bool(group.stream.norms) if group.kind is Kind.RESIDUAL else True


def _check(model: nn.Module, rotated: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    outs = []
    for each in (model, rotated):
        with torch.no_grad(), explicit_attention(each):
            outs.append([t.float() for t in tensors_in(run(each)) if t.is_floating_point()])
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(*outs, strict=True))
    last = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    if not worst <= max(TOLERANCE, LAST_PLACES * last):
        raise AnatomyError(
            f"{type(model).__name__} cannot be rotated: its output would change by {worst:.1e}; something besides "
            "norms and the layers behind them reads the residual stream (norms after the addition, for example)"
        )
