"""Units silenced in a whole model, nothing removed: what a cut must equal, and what allocators try out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Kind, PrunableGroup, Slot
from secateur.nn.masking import mute_experts_, restrict_norm_, silence_
from secateur.nn.narrow import INDEX
from secateur.nn.params import get_tensor
from secateur.nn.slicing import keep_mask


def mask_(root: nn.Module, cuts: Iterable[tuple[PrunableGroup, Tensor]]) -> None:
    """Silence, in place, every unit that is not kept.

    Args:
        root: what the groups' names are relative to.
        cuts: groups, each with the units that stay.
    """
    restricted: dict[str, Tensor] = {}
    for group, keep in cuts:
        if group.kind is Kind.EXPERTS:
            mute_experts_(root.get_submodule(group.owner), _router_masks(root, group, keep))
            continue
        for path in group.norms:
            alive = keep_mask(_norm_units(group, path), keep, group.size)
            restricted[path] = restricted[path] & alive if path in restricted else alive
        for slot in _silenced(group):
            silence_(root, slot.name, slot.axis, ~keep_mask(slot.units, keep, group.size))
    for path, alive in restricted.items():
        restrict_norm_(root.get_submodule(path), alive)


@contextmanager
def masked(root: nn.Module, cuts: Sequence[tuple[PrunableGroup, Tensor]]) -> Iterator[None]:
    """Within the context, units that are not kept are silent; see `mask_`."""
    silenced = {s.name for group, _ in cuts for s in _silenced(group)}
    held = {name: get_tensor(root, name).detach().clone() for name in silenced}
    classes = {owner: type(owner) for group, _ in cuts for owner in [root.get_submodule(group.owner)]}
    norms = [root.get_submodule(path) for group, _ in cuts for path in group.norms]
    mask_(root, cuts)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in held.items():
                get_tensor(root, name).copy_(value)
        for owner, cls in classes.items():
            owner.__class__ = cls
        for norm in norms:
            norm.__dict__.pop("forward", None)


def _silenced(group: PrunableGroup) -> list[Slot]:
    """What is zeroed to silence a unit: what reads it; of the stream, and of heads, which no layer or several kinds of
    layers read, all that it owns in the dense model."""
    if group.kind is Kind.RESIDUAL or group.narrowing is not None:
        return [s for s in group.slots if not s.name.endswith(INDEX)]
    return [s for s in group.slots if s.role == "consumer"]


def _norm_units(group: PrunableGroup, path: str) -> Tensor:
    """The unit that owns each number a norm reads: as in its own parameters, else as in the consumer behind it."""
    own = [s for s in group.slots if s.name.rpartition(".")[0] == path and s.axis == 0]
    return (own or [s for s in group.slots if s.role == "consumer"])[0].units


def _router_masks(root: nn.Module, group: PrunableGroup, keep: Tensor) -> dict[str, Tensor]:
    """What `mute_experts_` takes: the router's rows and biases, by name below the group's owner."""
    prefix = len(group.owner) + 1 if group.owner else 0
    return {
        s.name[prefix:]: keep_mask(s.units, keep, group.size)
        for s in group.slots
        if s.role == "producer" or get_tensor(root, s.name).numel() == len(s.units)
    }
