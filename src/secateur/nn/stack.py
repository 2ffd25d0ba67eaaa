"""Removing whole blocks from a container: what counts them, lists them or numbers them follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.errors import AnatomyError
from secateur.nn.standin import Returns


@dataclass(frozen=True)
class Stack:
    """A container of blocks, and what knows how many they are.

    Attributes:
        path: of the container (ModuleList, Sequential or ModuleDict).
        names: of its children that can be blocks, in order; units are counted among these.
        returns: what such a block returns, see `secateur.nn.standin`.
        counts: (module, attribute) of every number of children; an attribute may be dotted
            ("config.num_hidden_layers").
        lists: (module, attribute) of every list with an entry for each child ("config.layer_types").
        numbers: (path inside a child, attribute, offset) of every number that is the child's position plus an offset.
    """

    path: str
    names: tuple[str, ...]
    returns: Returns = None
    counts: tuple[tuple[str, str], ...] = ()
    lists: tuple[tuple[str, str], ...] = ()
    numbers: tuple[tuple[str, str, int], ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """Dotted paths of the blocks."""
        return tuple(f"{self.path}.{name}" if self.path else name for name in self.names)


def remove_(
    root: nn.Module, stack: Stack, keep: Sequence[int], instead: Mapping[int, nn.Module] | None = None
) -> Callable[[str], str | None]:
    """Remove blocks, in place.

    Args:
        root: the model.
        keep: indices of the blocks that stay, among `stack.names`.
        instead: modules that take the place of removed blocks, by index.

    Returns:
        From a dotted name before to the name after; None for what is gone (also for what was replaced).

    Raises:
        AnatomyError: the container is not the one that the stack describes.
    """
    container, stays = root.get_submodule(stack.path), set(keep)
    children: dict[str, Any] = dict(container._modules)
    if not stays or not stays <= set(range(len(stack.names))) or not set(stack.names) <= set(children):
        raise AnatomyError(f"'{stack.path}' does not hold the blocks {', '.join(stack.names)}; is it another model?")
    put = {stack.names[i]: module for i, module in (instead or {}).items()}
    gone = {name for i, name in enumerate(stack.names) if i not in stays}
    left = [i for i, name in enumerate(children) if name not in gone or name in put]
    names = list(children)
    _follow_(root, stack, left, len(children))
    numbered = all(name.isdigit() for name in children)
    renamed: dict[str, str | None] = dict.fromkeys(gone)
    container._modules.clear()
    for new, old in enumerate(left):
        name = names[old]
        if name not in gone:
            renamed[name] = str(new) if numbered else name
        container._modules[str(new) if numbered else name] = put.get(name, children[name])
    for new, child in enumerate(container._modules.values()):
        for inside, attribute, offset in stack.numbers:
            module = _inside(child, inside)
            if module is not None and isinstance(getattr(module, attribute, None), int):
                setattr(module, attribute, new + offset)
        if stack.numbers and any(child is module for module in put.values()):
            setattr(child, "layer_idx", new + stack.numbers[0][2])  # noqa: B010  whatever the blocks called it
    prefix = f"{stack.path}." if stack.path else ""

    def rename(dotted: str) -> str | None:
        if not dotted.startswith(prefix):
            return dotted
        child, dot, rest = dotted[len(prefix) :].partition(".")
        new = renamed.get(child, child)
        return None if new is None else f"{prefix}{new}{dot}{rest}"

    return rename


def _follow_(root: nn.Module, stack: Stack, left: list[int], size: int) -> None:
    """Counts and lists for the children that are left of so many."""
    for path, attribute in stack.counts:
        holder, name = holder_of(root.get_submodule(path), attribute)
        value = getattr(holder, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise AnatomyError(f"'{path}.{attribute}' is no count")
        setattr(holder, name, value - (size - len(left)))
    for path, attribute in stack.lists:
        holder, name = holder_of(root.get_submodule(path), attribute)
        value = getattr(holder, name)
        if not isinstance(value, (list, tuple)) or len(value) != size:
            raise AnatomyError(f"'{path}.{attribute}' is no list of {size} entries")
        setattr(holder, name, type(value)(value[i] for i in left))


def holder_of(module: nn.Module, attribute: str) -> tuple[Any, str]:
    """The object that holds a dotted attribute, and its name there.

    Raises:
        AnatomyError: a private name.
    """
    *objects, name = attribute.split(".")
    if any(part.startswith("_") for part in (*objects, name)):
        raise AnatomyError(f"refusing to follow '{attribute}': it is private")
    holder: Any = module
    for part in objects:
        holder = getattr(holder, part)
    return holder, name


def _inside(child: nn.Module | None, path: str) -> nn.Module | None:
    try:
        return None if child is None else child.get_submodule(path)
    except AttributeError:
        return None
