"""Applying a Plan: compensate, slice, rewrite attributes, remove blocks.

The result computes what the masked model computes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.masked import mask_
from secateur.anatomy.residual import narrow_stream_
from secateur.anatomy.types import Anatomy, Consumer, PrunableGroup
from secateur.calibration.statistics import Statistics
from secateur.errors import DataError, PlanError
from secateur.fingerprint import fingerprint
from secateur.nn.attention import HeadwiseAttention
from secateur.nn.localconfig import own_sizes
from secateur.nn.narrow import Narrowing, narrow_
from secateur.nn.params import get_tensor
from secateur.nn.reforward import reforward_
from secateur.nn.slicing import finish_, keep_mask, slice_tensors_
from secateur.nn.standin import handing_on
from secateur.plan import Plan
from secateur.surgery.compensate import Compensator, compensators
from secateur.surgery.depth import absentees, remove_blocks_, split
from secateur.surgery.layer import LayerCut, add_to_bias_, read_weight, write_weight_
from secateur.surgery.recipe import Recipe

_RECIPE, _PLAN = "secateur_recipe", "secateur_plan"


def check_plan(model: nn.Module, plan: Plan, anatomy: Anatomy) -> dict[str, tuple[PrunableGroup, Tensor]]:
    """The groups that a plan really cuts, with the units that each keeps.

    Raises:
        PlanError: the plan is for another model, or cuts what cannot be cut.
    """
    structure = plan.model.get("structure")
    mine = fingerprint(model)["structure"]
    if structure and structure != mine:
        raise PlanError(
            f"the plan was made for '{plan.model.get('name', '?')}' (structure {structure}), this model has structure "
            f"{mine}; plan this model, or load the one the plan was made for"
        )
    out = {}
    for name, kept in plan.groups.items():
        group = anatomy.groups.get(name)
        if group is None or group.size != kept.size:
            found = "no such group" if group is None else f"{group.size} units"
            raise PlanError(f"the plan keeps {len(kept.keep)} of {kept.size} units of '{name}', the model has {found}")
        if len(kept.keep) == group.size:
            continue
        if not group.cuttable:
            raise PlanError(f"'{name}' cannot be cut: {group.reason}")
        if len(kept.keep) < group.least or len(kept.keep) % group.multiple:
            raise PlanError(
                f"'{name}' must keep at least {group.least} of {group.size} units and a multiple of {group.multiple}, "
                f"the plan keeps {len(kept.keep)}"
            )
        out[name] = (group, torch.tensor(kept.keep))
    return out


def tensor_masks(cuts: Mapping[str, tuple[PrunableGroup, Tensor]]) -> dict[str, dict[int, Tensor]]:
    """For each tensor and axis, which elements stay, over all groups together."""
    masks: dict[str, dict[int, Tensor]] = {}
    for group, keep in cuts.values():
        for slot in group.slots:
            mine = keep_mask(slot.units, keep, group.size)
            axes = masks.setdefault(slot.name, {})
            axes[slot.axis] = axes[slot.axis] & mine if slot.axis in axes else mine
    return masks


def consumer_cuts(
    cuts: Mapping[str, tuple[PrunableGroup, Tensor]], statistics: Statistics | None, ridge: float
) -> list[LayerCut]:
    """Every consumer layer that loses inputs, with the inputs that stay."""
    found: dict[str, tuple[Consumer, Tensor]] = {}
    for group, keep in cuts.values():
        for consumer in group.consumers:
            mine = keep_mask(consumer.units, keep, group.size)
            _, alive = found.get(consumer.module, (consumer, torch.ones_like(mine)))
            found[consumer.module] = (consumer, alive & mine)
    layers = {} if statistics is None else statistics.layers
    return [LayerCut(c, alive, layers.get(path), ridge) for path, (c, alive) in found.items()]


@torch.no_grad()
def prune_(
    model: nn.Module,
    plan: Plan,
    *,
    anatomy: Anatomy,
    compensate: str = "affine",
    statistics: Statistics | None = None,
    ridge: float = 1e-3,
    add_bias: bool = True,
) -> nn.Module:
    """Cut a model in place by slicing, with a closed-form compensator. See `prune`."""
    rule: Compensator = compensators.get(compensate)
    cuts, depth = split(check_plan(model, plan, anatomy))
    layers = consumer_cuts(cuts, statistics, ridge)
    if rule.data and not rule.sequential and statistics is None and cuts:
        raise DataError(f"compensator '{compensate}' needs statistics; calibrate first, or use compensate='none'")
    before = _structure(model)
    added = []
    for layer in layers:
        weight = read_weight(model, layer.consumer)
        if weight.shape[0] != len(layer.alive) or bool(layer.alive.all()):
            continue  # a grouped convolution reads its inputs apart: sliced as it is
        weight, shift = rule.refit(layer, weight)
        write_weight_(model, layer.consumer, weight)
        name = add_to_bias_(model, layer.consumer, shift, may_add=add_bias)
        added += [name] if name else []
    rewritten = {path: dict(heads) for group, _ in cuts.values() for path, heads in group.rewritten}
    for path, heads in rewritten.items():
        reforward_(model.get_submodule(path), heads)
    narrowed = list(dict.fromkeys(group.narrowing for group, _ in cuts.values() if group.narrowing is not None))
    for how in narrowed:
        narrow_(model, how)
    for group, keep in cuts.values():
        narrow_stream_(model, group, len(keep))
    masks = tensor_masks(cuts)
    for name in added:  # a new bias follows its layer's outputs
        axis_masks = masks.get(f"{name.rpartition('.')[0]}.weight", {})
        consumer = next(x.consumer for x in layers if f"{x.consumer.module}.bias" == name)
        if 1 - consumer.axis in axis_masks:
            masks[name] = {0: axis_masks[1 - consumer.axis]}
    slice_tensors_(model, masks)
    edits = [(edit, group.size - len(keep)) for group, keep in cuts.values() for edit in group.edits]
    finish_(model, masks, edits)
    recipe = recipe_of(model).then(_recipe(model, before, masks, rewritten, added, cuts, narrowed))
    mark_as_cut(model, remove_blocks_(model, depth, recipe), plan)
    return model


def prune(model: nn.Module, plan: Plan, **options: Any) -> nn.Module:
    """A new, smaller model; the given one stays as it is. Options as `prune_`.

    Args:
        model: the dense model.
        plan: for this model.
        anatomy: of this model.
        compensate: a name from `list_compensators()`.
        statistics: of the dense model, for compensators that use them.
        ridge: of the regression, relative to the mean diagonal.
        add_bias: give a consumer without a bias one, where the compensator wants it.

    Raises:
        PlanError: the plan is for another model.
        DataError: the compensator needs statistics.
    """
    return prune_(copy.deepcopy(model), plan, **options)


@torch.no_grad()
def mask(model: nn.Module, plan: Plan, anatomy: Anatomy) -> nn.Module:
    """A copy of the dense model in which the units that the plan removes are silent, and the blocks that it removes
    hand on what they take in: the reference for `prune`."""
    out = copy.deepcopy(model)
    cuts, depth = split(check_plan(model, plan, anatomy))
    for group, keep in depth.values():
        for path in absentees({group.name: (group, keep)}):
            out.get_submodule(path).forward = handing_on(group.stack.returns)  # type: ignore[union-attr]
    mask_(out, cuts.values())
    return out


def recipe_of(model: nn.Module) -> Recipe:
    """What was changed in a model by `prune`; an empty recipe for a dense one."""
    return getattr(model, _RECIPE, None) or Recipe()


def plan_of(model: nn.Module) -> Plan | None:
    return getattr(model, _PLAN, None)


def mark_as_cut(model: nn.Module, recipe: Recipe, plan: Plan | None) -> None:
    """Remember what was done to a model (used by loading, and by rotations, which have no plan)."""
    object.__setattr__(model, _RECIPE, recipe)
    object.__setattr__(model, _PLAN, plan)


def _structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every size attribute of every module."""
    return {
        path: {k: v for k, v in vars(m).items() if _is_size(k, v)} | own_sizes(m) for path, m in model.named_modules()
    }


def _is_size(name: str, value: Any) -> bool:
    if name.startswith("_") or isinstance(value, bool):
        return False
    if isinstance(value, int):
        return True
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(v, int) for v in value)


def _recipe(
    model: nn.Module,
    before: dict[str, dict[str, Any]],
    masks: Mapping[str, Any],
    rewritten: dict[str, dict[str, int]],
    added: list[str],
    cuts: Mapping[str, tuple[PrunableGroup, Tensor]],
    narrowed: list[Narrowing],
) -> Recipe:
    changed = [
        (path, name, list(value) if isinstance(value, (tuple, list)) else value)
        for path, attributes in _structure(model).items()
        for name, value in attributes.items()
        if before[path].get(name) != value
    ]
    return Recipe(
        shapes={name: list(get_tensor(model, name).shape) for name in masks},
        attributes=changed,
        headwise=[p for p, m in model.named_modules() if type(m) is HeadwiseAttention],
        rewritten=list(rewritten.items()),
        biases=added,
        narrowed=narrowed,
        eps=[
            (norm.module, norm.eps, getattr(model.get_submodule(norm.module), norm.eps))
            for group, _ in cuts.values()
            for norm in group.stream.norms
            if norm.eps
        ],
    )
