"""Removing units from a module: every parameter they own shrinks, every attribute that counted them follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.nn.attention import HeadwiseAttention, can_spell_out
from secateur.nn.localconfig import get_size, set_size
from secateur.nn.params import get_tensor, owner_of, set_tensor, sync_attributes


@dataclass(frozen=True)
class AttrEdit:
    """An attribute that counts units: it shrinks by `per_unit` for every unit removed.

    Attributes:
        module: dotted path.
        attr: attribute name, "config.<name>" for what the module reads from its config.
        index: position, where the attribute is a list or tuple of sizes.
        per_unit: by how much the number falls when one unit goes.
        size: units in the dense group, if the number is a multiple of it: then it falls in proportion, so that
            groups that are factors of one number may both be cut.
    """

    module: str
    attr: str
    per_unit: int
    index: int | None = None
    size: int = 0

    def apply_(self, root: nn.Module, removed: int) -> None:
        module = root.get_submodule(self.module)
        value = get_size(module, self.attr)
        if self.index is None:
            set_size(module, self.attr, self._after(value, removed))
        else:
            items = list(value)
            items[self.index] = self._after(items[self.index], removed)
            setattr(module, self.attr, type(value)(items))

    def _after(self, value: int, removed: int) -> int:
        if self.size:
            return value * (self.size - removed) // self.size
        return value - removed * self.per_unit


def keep_mask(units: Tensor, keep: Tensor, size: int) -> Tensor:
    """Which elements along an axis stay: those owned by a kept unit, and those owned by none.

    Args:
        units: [n], the unit that owns each element, or -1.
        keep: [k], kept units.
        size: number of units in the group.
    """
    alive = torch.zeros(size + 1, dtype=torch.bool)
    alive[keep] = True
    alive[size] = True  # -1 wraps to the last entry
    return alive[units]


def slice_tensors_(root: nn.Module, masks: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Slice parameters and buffers in place.

    Args:
        masks: for each tensor name, for each axis, which elements stay (bool, [n]).
    """
    old = {name: get_tensor(root, name) for name in masks}
    new: dict[int, Tensor] = {}
    for name, axes in masks.items():
        if id(old[name]) not in new:
            value = old[name].detach()
            for axis, mask in axes.items():
                value = value.index_select(axis, mask.nonzero()[:, 0].to(value.device))
            set_tensor(root, name, value.clone())
            new[id(old[name])] = get_tensor(root, name)
        else:  # a second name for the same tensor: they stay tied
            module, leaf = owner_of(root, name)
            (module._buffers if leaf in module._buffers else module._parameters)[leaf] = new[id(old[name])]  # type: ignore[assignment]


def finish_(root: nn.Module, names: Iterable[str], edits: Iterable[tuple[AttrEdit, int]]) -> None:
    """After slicing: apply attribute edits, bring standard layers in line, spell cut attentions out, drop caches."""
    for edit, removed in edits:
        edit.apply_(root, removed)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        sync_attributes(root.get_submodule(path))
    for module in root.modules():
        if can_spell_out(module) and module.num_heads * module.head_dim != module.embed_dim:
            module.__class__ = HeadwiseAttention
        drop_caches_(module)


def drop_caches_(module: nn.Module) -> None:
    """Empty the dicts called a cache in which a module keeps tensors made from its parameters (attention biases)."""
    for name, value in vars(module).items():
        if "cache" in name and isinstance(value, dict) and value and all(map(_is_tensor, value.values())):
            value.clear()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
