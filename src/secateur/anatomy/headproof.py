"""The proof that attention runs with smaller heads: a copy of its module with random weights, masked and sliced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.anatomy.masked import mask_
from secateur.anatomy.types import Kind, PrunableGroup, Slot
from secateur.anatomy.verify import TOLERANCE, compare, randomise_
from secateur.errors import reason
from secateur.nn.narrow import INDEX, QK, VO, Narrowing, narrow_
from secateur.nn.slicing import AttrEdit, finish_, keep_mask, slice_tensors_
from secateur.nn.trees import tensors_in


def narrowed(group: PrunableGroup, how: Narrowing) -> PrunableGroup:
    """The group with what it takes to cut it."""
    size = QK if group.kind is Kind.QK_DIM else VO
    slots = list(group.slots)
    if group.kind is Kind.QK_DIM and how.tables:
        slots.append(Slot(f"{how.module}.{INDEX}", 0, first_units(group)[: how.size], "other"))
    edit = AttrEdit(how.module, size, how.size // group.size)
    return replace(group, slots=tuple(slots), edits=(edit,), narrowing=how, reason="")


def first_units(group: PrunableGroup) -> Tensor:
    """[n]: the units of the first projection, in the order of its features."""
    units = next(s.units for s in group.slots if s.role == "producer")
    return units[units >= 0]


def prove_heads(group: PrunableGroup, owner: nn.Module, inputs: tuple | None) -> str:
    """Empty if a randomised copy of the owner gives, cut, what it gives masked; else what went wrong."""
    if inputs is None or group.narrowing is None:
        return "its module was never called"
    keep = torch.randperm(group.size, generator=torch.Generator().manual_seed(0))
    keep = keep[: max(1, group.size * 2 // 3)].sort().values
    local = _local(group)
    try:
        base = copy.deepcopy(owner)
        randomise_(base)
        masked = copy.deepcopy(base)
        mask_(masked, [(local, keep)])
        reference = _call(masked, inputs)
        if local.narrowing is None or not narrow_(base, local.narrowing):
            return f"the code of {type(owner).__name__} has no place for heads of another size"
        slice_heads_(base, local, keep)
        out = _call(base, inputs)
    except Exception as e:  # the module's own code refusing the size is an answer, not a crash
        return f"{type(owner).__name__} cannot run with smaller heads: {reason(e)}"
    failure = compare(reference, out, TOLERANCE[torch.float32])
    return failure and f"smaller heads change {type(owner).__name__}: {failure}"


def slice_heads_(root: nn.Module, group: PrunableGroup, keep: Tensor) -> None:
    """Cut the head dimensions of one narrowed layer, in place."""
    masks: dict[str, dict[int, Tensor]] = {}
    for slot in group.slots:
        masks.setdefault(slot.name, {})[slot.axis] = keep_mask(slot.units, keep, group.size)
    slice_tensors_(root, masks)
    finish_(root, masks, [(edit, group.size - len(keep)) for edit in group.edits])


def inputs_of(model: nn.Module, owners: set[str], run: Callable[[nn.Module], Any]) -> dict[str, tuple]:
    """The arguments with which modules are called."""
    found: dict[str, tuple] = {}
    handles = []
    for path in owners:

        def before(_module, args, kwargs, path=path):
            found.setdefault(path, tree_map(_detached, (args, dict(kwargs))))

        handles.append(model.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _call(module: nn.Module, inputs: tuple) -> list[Tensor]:
    args, kwargs = copy.deepcopy(inputs)
    with torch.no_grad():
        out = module(*args, **kwargs)
    return [t.float() for t in list(tensors_in(out))[:1]]  # what else attention returns are its weights


def _local(group: PrunableGroup) -> PrunableGroup:
    prefix = len(group.owner) + 1
    return replace(
        group,
        slots=tuple(replace(s, name=s.name[prefix:]) for s in group.slots),
        edits=tuple(replace(e, module=e.module[prefix:]) for e in group.edits),
        narrowing=group.narrowing and replace(group.narrowing, module=group.narrowing.module[prefix:]),
    )
