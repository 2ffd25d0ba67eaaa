"""The steps of the pipeline as a user calls them: each finds by itself what the step before it left."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from secateur.anatomy import Anatomy, find_anatomy
from secateur.calibration import Statistics
from secateur.calibration import calibrate as _calibrate
from secateur.data import batches
from secateur.errors import DataError, PlanError, SecateurWarning
from secateur.fingerprint import fingerprint
from secateur.models import example_input, source_of
from secateur.models import forward as library_forward
from secateur.nn.replacement import HOWS
from secateur.plan import Kept, Plan
from secateur.progress import doing
from secateur.surgery import compensators
from secateur.surgery import prune as _prune
from secateur.surgery import prune_ as _prune_
from secateur.surgery.cut import check_plan, mark_as_cut, plan_of, recipe_of
from secateur.surgery.depth import absentees, check_run, remove_blocks_, split, stack_group, standing_aside, take_out_
from secateur.surgery.rotation import ROTATIONS
from secateur.surgery.rotation import rotate as _rotate
from secateur.surgery.sequential import refit_
from secateur.surgery.shorten import fit


def inspect(
    model: nn.Module, example: Any = None, *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> Anatomy:
    """Find every PrunableGroup of a model.

    Args:
        model: of timm, transformers or open_clip, or any module of your own.
        example: an input, batch first; random images of the model's size by default.
        forward: how to call the model on it; the library's own way by default.

    Raises:
        AnatomyError: the model cannot be run on the example.
    """
    example = example_input(model) if example is None else example
    with doing("Finding what can be cut"):
        return find_anatomy(model, example, forward or library_forward, rotated=recipe_of(model).rotated)


def calibrate(model: nn.Module, data: Any, anatomy: Anatomy | None = None, **options: Any) -> Statistics:
    """Collect statistics; see `secateur.calibration.calibrate`. The anatomy is found if it is not given."""
    anatomy = anatomy or inspect(model)
    statistics = _calibrate(model, data, anatomy, **options)
    statistics.model, statistics.anatomy = model, anatomy
    return statistics


def rotate(
    model: nn.Module,
    stats: Statistics,
    kinds: Collection[str] = ("residual",),
    *,
    anatomy: Anatomy | None = None,
    example: Any = None,
) -> nn.Module:
    """A model that computes the same in another basis, in which the units that matter least come last.

    Its groups of these kinds can be cut like any other (criterion "order" keeps the first ones); calibrate it anew for
    compensators, which see the new basis.

    Args:
        model: the dense model, unchanged.
        stats: of this model, from `calibrate(..., moments=kinds)`.
        kinds: "residual": the residual stream in its principal components (SliceGPT); "vo_dim": values by the SVD with
            their output projection (MoDeGPT); "qk_dim": pairs of query/key dimensions, which stay what they are.
        anatomy: of this model; that of the statistics by default.
        example: an input to check the result on; as for `inspect`.

    Raises:
        AnatomyError: the model has no such group, or cannot be rotated without changing what it computes.
        DataError: the statistics lack the moments, or belong to another model.
    """
    unknown = sorted(set(kinds) - set(ROTATIONS))
    if unknown or not kinds:
        raise DataError(f"kind '{', '.join(unknown)}' cannot be rotated; use {', '.join(ROTATIONS)}")
    if stats.meta.get("fingerprint", mark := fingerprint(model)) != mark:
        raise DataError("these statistics belong to another model, or to other weights; calibrate this one")
    anatomy = anatomy or stats.anatomy or inspect(model)
    example = example_input(model) if example is None else example
    return _rotate(model, stats, anatomy, tuple(kinds), lambda m: library_forward(m, example))


def prune(model: nn.Module, plan: Plan, **options: Any) -> nn.Module:
    """A new, smaller model, the given one untouched; see `prune_` for the options."""
    return _cut(_prune, model, plan, **options)


def prune_(model: nn.Module, plan: Plan, **options: Any) -> nn.Module:
    """Cut a model in place.

    Args:
        model: the dense model.
        plan: for this model.
        compensate: "none", "mean", "ridge", "affine" or "sequential" (`list_compensators()`).
        stats: of the dense model.
        data: images or text, for "sequential", which reads them again.
        anatomy: of the dense model; that of the statistics by default.
        batch_size, limit, seed, window, stride: of `data`, see `secateur.data.batches`.
        ridge, add_bias: see `secateur.surgery.prune_`.

    Raises:
        PlanError: the plan is for another model.
        DataError: statistics or images are needed.
    """
    return _cut(_prune_, model, plan, **options)


def _check_origin(model: nn.Module, plan: Plan, stats: Statistics | None) -> None:
    """Refuse statistics of another model; announce what was made from other weights of this one."""
    mine = fingerprint(model)
    origins = {"plan": plan.model} if plan.model else {}
    if stats is not None and "fingerprint" in stats.meta:
        origins["statistics"] = stats.meta["fingerprint"]
        if origins["statistics"]["structure"] != mine["structure"]:
            raise DataError("these statistics belong to another model; calibrate this one")
    for what, origin in origins.items():
        if origin.get("structure") == mine["structure"] and origin.get("weights", mine["weights"]) != mine["weights"]:
            warnings.warn(
                f"the {what} came from other weights of this architecture; the cut may be a poor one",
                SecateurWarning,
                stacklevel=4,
            )


def _cut(
    function: Callable[..., nn.Module],
    model: nn.Module,
    plan: Plan,
    *,
    compensate: str = "affine",
    stats: Statistics | None = None,
    data: Any = None,
    anatomy: Anatomy | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    window: int = 256,
    stride: int | None = None,
    ridge: float = 1e-3,
    add_bias: bool = True,
) -> nn.Module:
    rule = compensators.get(compensate)
    _check_origin(model, plan, stats)
    anatomy = anatomy or (stats.anatomy if stats else None) or inspect(model)
    cuts = any(len(kept.keep) < kept.size for kept in plan.groups.values())
    if not rule.sequential or not cuts:
        return function(
            model, plan, anatomy=anatomy, compensate=compensate, statistics=stats, ridge=ridge, add_bias=add_bias
        )
    if data is None:
        raise DataError(f"compensator '{compensate}' reads the calibration images again: give data= (--images)")
    if function is _prune_:
        raise DataError(f"compensator '{compensate}' needs the dense model beside the cut one: use prune, not prune_")
    width, depth = split(check_plan(model, plan, anatomy))
    widths = plan.model_copy(update={"groups": {n: plan.groups[n] for n in width}})
    small = function(
        model, widths, anatomy=anatomy, compensate=compensate, statistics=stats, ridge=ridge, add_bias=add_bias
    )
    images = batches(
        data, source_of(model).input, size=batch_size, limit=limit, seed=seed, window=window, stride=stride
    )
    with standing_aside(small, depth):  # blocks go last: what stays makes up for them as for anything else
        gone = tuple(absentees(depth))
        added = refit_(small, model, anatomy, images, statistics=stats, add_bias=add_bias, absent=gone)
    recipe = recipe_of(small)
    recipe.biases.extend(name for name in added if name not in recipe.biases)
    mark_as_cut(small, remove_blocks_(small, depth, recipe), plan)
    return small


def shorten(
    model: nn.Module,
    start: int,
    stop: int,
    data: Any,
    *,
    how: str = "linear",
    stack: str | None = None,
    anatomy: Anatomy | None = None,
    steps: int = 500,
    seconds: float = 300.0,
    batch_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    window: int = 256,
    stride: int | None = None,
) -> nn.Module:
    """A new model in which one cheap module, fitted without labels, does what a run of blocks did.

    Args:
        model: as loaded, cut, or shortened elsewhere.
        start, stop: the run, as a slice of the blocks that this model has (replacements are not counted): block
            `start` is the first that goes, block `stop` stays.
        data: images or text to fit it on.
        how: "linear": an affine map of each token's stream, in closed form; "mlp": that and a small network beside it,
            trained for so many `steps`, or `seconds` if they are over first.
        stack: name of the group of blocks, where the model has several.
        anatomy: of this model.
        batch_size, limit, seed, window, stride: of `data`, see `secateur.data.batches`.

    Raises:
        PlanError: no such run, or a block in it must stay.
        DataError: the stream is no sequence of tokens.
    """
    anatomy = anatomy or inspect(model)
    group, recipe = stack_group(anatomy, stack), recipe_of(model)
    check_run(group, start, stop)
    images = batches(
        data, source_of(model).input, size=batch_size, limit=limit, seed=seed, window=window, stride=stride
    )
    if how not in HOWS:
        raise PlanError(f"a run of blocks is replaced by {' or '.join(HOWS)}, found '{how}'")
    fitted = fit(model, group, start, stop, images, how=how, steps=steps, seconds=seconds)
    small = copy.deepcopy(model)
    keep = [i for i in range(group.size) if not start <= i < stop]
    assert group.stack is not None
    recipe = take_out_(small, group.stack, keep, recipe.model_copy(deep=True), {start: fitted})
    plan = plan_of(model) or Plan(model={"name": source_of(model).name, **fingerprint(model)})
    before = plan.groups.get(group.name) or Kept(kind=str(group.kind), size=group.size, keep=tuple(range(group.size)))
    kept = before.model_copy(update={"keep": tuple(before.keep[i] for i in keep)})  # in terms of the dense model
    runs = [*plan.made_by.get("shorten", []), {"start": start, "stop": stop, "how": how}]
    made_by = {**plan.made_by, "shorten": runs}
    plan = plan.model_copy(update={"groups": {**plan.groups, group.name: kept}, "made_by": made_by, "predicted": {}})
    mark_as_cut(small, recipe, plan)
    return small
