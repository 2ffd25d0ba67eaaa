"""Removing whole blocks from a model that is otherwise finished; what a Plan says of stacks is done here, last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Kind, PrunableGroup
from secateur.errors import PlanError
from secateur.nn.replacement import Replacement, Structure
from secateur.nn.stack import Stack, remove_
from secateur.replay import absent
from secateur.surgery.recipe import BlockCut, Recipe

# A Plan as surgery reads it: the groups that are cut, with the units that each keeps.
Cuts = Mapping[str, tuple[PrunableGroup, Tensor]]


def split(cuts: Cuts) -> tuple[dict[str, tuple[PrunableGroup, Tensor]], dict[str, tuple[PrunableGroup, Tensor]]]:
    """Cuts of widths, and of depth. Widths inside blocks that go are left out: nothing of them remains.

    Raises:
        PlanError: a block goes that must stay.
    """
    depth = {n: c for n, c in cuts.items() if c[0].kind is Kind.BLOCKS}
    for name, (group, keep) in depth.items():
        gone = sorted(set(group.fixed) - set(keep.tolist()))
        if gone:
            raise PlanError(f"block {gone[0]} of '{name}' must stay: {group.fixed[gone[0]]}; plan without it")
    lost = tuple(path + "." for path in absentees(depth))
    widths = {n: c for n, c in cuts.items() if n not in depth and not f"{c[0].owner}.".startswith(lost)}
    return widths, depth


def absentees(cuts: Cuts) -> list[str]:
    """Paths of the blocks that go."""
    return [
        path
        for group, keep in cuts.values()
        if group.stack is not None
        for i, path in enumerate(group.stack.members)
        if i not in set(keep.tolist())
    ]


@contextmanager
def standing_aside(model: nn.Module, cuts: Cuts) -> Iterator[None]:
    """Within the context, the blocks that are to go hand on what they take in: all names still hold."""
    with ExitStack() as contexts:
        for name, (group, keep) in cuts.items():
            if group.stack is not None:
                blocks = [model.get_submodule(p) for p in absentees({name: (group, keep)})]
                contexts.enter_context(absent(blocks, group.stack.returns))
        yield


def remove_blocks_(model: nn.Module, cuts: Cuts, recipe: Recipe) -> Recipe:
    """Remove blocks, in place.

    Args:
        cuts: of depth, in names of the dense model.
        recipe: of what was done to the model before.

    Returns:
        The whole recipe.
    """
    for group, keep in sorted(cuts.values(), key=lambda c: -c[0].owner.count(".")):  # inner stacks while names hold
        if group.stack is not None:
            recipe = take_out_(model, group.stack, keep.tolist(), recipe)
    return recipe


def take_out_(
    model: nn.Module,
    stack: Stack,
    keep: list[int],
    recipe: Recipe,
    instead: Mapping[int, tuple[Structure, Replacement]] | None = None,
) -> Recipe:
    """Remove blocks of one stack, in place, perhaps putting replacements there; the recipe that says so as well."""
    instead = instead or {}
    cut = BlockCut(stack=stack, keep=keep, replaced={i: structure for i, (structure, _) in instead.items()})
    rename = remove_(model, stack, keep, {i: module for i, (_, module) in instead.items()})
    return recipe.without(cut, rename)


def stack_group(anatomy: Anatomy, name: str | None = None) -> PrunableGroup:
    """The stack of that name; the only one if none is given.

    Raises:
        PlanError: there is none, or there are several.
    """
    found = {n: g for n, g in anatomy.removable.items() if name in (None, n)}
    if len(found) != 1:
        have = ", ".join(anatomy.removable) or "none"
        raise PlanError(f"name the one stack to shorten; those of which blocks can be removed: {have}")
    return next(iter(found.values()))


def check_run(group: PrunableGroup, start: int, stop: int) -> None:
    """Refuse a run of blocks that is none, or cannot go.

    Raises:
        PlanError: with what the stack has.
    """
    if not 0 <= start < stop <= group.size or stop - start == group.size:
        raise PlanError(f"'{group.name}' has blocks 0 to {group.size - 1}, one of which stays; found {start}:{stop}")
    if stuck := sorted(set(group.fixed) & set(range(start, stop))):
        why = group.fixed[stuck[0]]
        raise PlanError(f"block {stuck[0]} of '{group.name}' must stay: {why}; give a run without it")
