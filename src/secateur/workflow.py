"""`compress`: the whole pipeline in one call, resumable."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import __version__
from secateur.allocation import Budget, Problem, allocate, allocators
from secateur.allocation.base import check_choice, check_reachable
from secateur.anatomy import Anatomy, Kind
from secateur.api import calibrate, inspect, prune
from secateur.artifact import load_model, save
from secateur.calibration import Statistics
from secateur.criteria import Scores, criteria, score
from secateur.data import Batches, batches
from secateur.errors import AnatomyError, BudgetError, DataError, SecateurError, SecateurWarning
from secateur.evaluation import fidelity
from secateur.files import check_writable
from secateur.fingerprint import fingerprint
from secateur.measurement import latency
from secateur.models import source_of
from secateur.plan import Plan
from secateur.result import Result, Settings, table
from secateur.steps import Steps, mark_of_images
from secateur.surgery import compensators, recipe_of


def compress(
    model: nn.Module | str | Path,
    images: Any,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    measure: bool = True,
    model_options: dict[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """Cut a model to a budget, without labels and without training.

    load -> anatomy -> calibrate -> score -> allocate -> cut and compensate -> evaluate -> measure -> save.

    Args:
        model: anything `load_model` takes.
        images: unlabeled images, or text for a language model, anything `batches` takes; a part is held out for
            evaluation.
        out: folder to save to; finished steps are kept in `<out>.work` beside it until it is there.
        resume: go on from the finished steps of an interrupted run with the same settings (needs `out`).
        measure: time both models (not with a memory budget).
        model_options: passed to `load_model`.
        settings:
            keep_params, keep_macs: share to keep; or min_quality: lowest cosine to the dense features.
            criterion, allocator, compensator: names from the registries.
            kinds: cut only groups of these kinds; ("blocks",) removes whole blocks instead of narrowing them.
            limit, held_out: at most so many images for calibration and for evaluation.
            batch_size, dtype, seed, broken: of the calibration.
            window, stride: of text, see `batches`.
            floor, align, uniform_width: of the allocation.
            ridge: of the compensation.
            memory_budget: such as "6GB"; the model, a local transformers folder, is then never in memory as a whole but
                calibrated and cut one block at a time, with criteria that need no gradients (needs `out`).

    Raises:
        SecateurError: whatever goes wrong, in one line that says what to do.
    """
    try:
        wanted = Settings.of(**settings)
    except TypeError as e:
        raise SecateurError(f"unknown setting ({e}); see help(secateur.compress)") from e
    budget = wanted.budget()
    for registry, name in (
        (criteria, wanted.criterion),
        (allocators, wanted.allocator),
        (compensators, wanted.compensator),
    ):
        registry.get(name)
    if resume and out is None:
        raise SecateurError("resume needs out=, the folder of the run to go on with")
    if out is not None:
        check_writable(Path(out))
    if wanted.memory_budget is not None:
        return _streamed(model, images, wanted, budget, out, resume, model_options)
    dense = load_model(model, **(model_options or {}))
    if recipe_of(dense).shapes:
        raise SecateurError("the model was cut before; compress the dense one, to a smaller budget")
    calibration, held_out, skipped = split(images, dense, wanted)
    anatomy = inspect(dense)
    _check_possible(anatomy, wanted, budget)
    run = _marks(fingerprint(dense), calibration, held_out, wanted)
    steps = Steps(None if out is None else Path(out), resume, run)
    with steps.announced():
        result = _run(steps, dense, anatomy, calibration, held_out, wanted, budget)
        result.skipped = skipped
        result.timings = latency({"dense": dense, "cut": result.model}) if measure else {}
        result.table = table(dense, result.model, result.timings)
        if out is not None:
            save(result.model, out, figures=result.figures())
            steps.finish()
    return result


def _streamed(
    model: Any,
    images: Any,
    wanted: Settings,
    budget: Budget,
    out: str | Path | None,
    resume: bool,
    model_options: dict[str, Any] | None,
) -> Result:
    """The same job on a model that stays on disk."""
    from secateur.streaming import Job, Streamed, check_methods, parse_bytes

    parse_bytes(str(wanted.memory_budget))
    check_methods(wanted.criterion, wanted.allocator, budget)
    if out is None:
        raise SecateurError("a memory budget needs out=, the folder that finished blocks are written to")
    if not isinstance(model, (str, Path)) or model_options:
        raise SecateurError("with a memory budget give the folder of the model, and no options of loading")
    source = Streamed.open(model)
    calibration, held_out, skipped = split(images, source.model, wanted)
    anatomy = inspect(source.model)
    _check_possible(anatomy, wanted, budget)
    steps = Steps(Path(out), resume, _marks(source.fingerprint(), calibration, held_out, wanted))
    with steps.announced():
        result = Job(source, anatomy, calibration, held_out, wanted).run(budget, steps, Path(out))
        result.skipped = skipped
        _note_disappointments(result, budget)
        steps.finish()
    return result


def _marks(model: dict[str, str], calibration: Batches, held_out: Batches, wanted: Settings) -> dict[str, Any]:
    """Everything that the finished steps of a run depend on."""
    return {
        "secateur": __version__,
        "model": model,
        "calibration images": mark_of_images(calibration),
        "held-out images": mark_of_images(held_out),
        **asdict(wanted),
    }


def _run(
    steps: Steps,
    dense: nn.Module,
    anatomy: Anatomy,
    calibration: Batches,
    held_out: Batches,
    wanted: Settings,
    budget: Budget,
) -> Result:
    """From statistics to the compared model."""
    statistics = _statistics(steps, dense, anatomy, calibration, wanted)
    scores = steps.keep(
        "scores.safetensors",
        Scores,
        lambda: score(statistics, wanted.criterion, model=dense, anatomy=anatomy, seed=wanted.seed),
    )
    scores.anatomy = anatomy

    def cut(plan: Plan, data: Batches) -> nn.Module:
        return prune(
            dense, plan, compensate=wanted.compensator, stats=statistics, data=data, anatomy=anatomy, ridge=wanted.ridge
        )

    def quality_of(plan: Plan) -> float:
        """Of a plan, from a refit on part of the images: the final cut, refit on all of them, is no worse."""
        few = calibration.pick(range(min(128, len(calibration.items))))
        return fidelity(cut(plan, few), dense, held_out).quality

    plan = steps.keep(
        "plan.json",
        Plan,
        lambda: allocate(
            scores,
            budget,
            wanted.allocator,
            anatomy=anatomy,
            kinds=wanted.kinds,
            floor=wanted.floor,
            align=wanted.align,
            uniform_width=wanted.uniform_width,
            model=dense,
            data=calibration,
            quality_of=quality_of,
            model_name=source_of(dense).name,
        ),
    )
    small = cut(plan, calibration)
    result = Result(small, plan, fidelity(small, dense, held_out), held_out is not calibration, [], settings=wanted)
    result.reused = steps.reused
    _note_disappointments(result, budget)
    return result


def split(images: Any, dense: nn.Module, settings: Settings) -> tuple[Batches, Batches, dict[str, str]]:
    """Calibration and held-out images, all of them readable, disjoint and drawn with the seed, at least a fifth held
    out; and what was skipped. Of fewer than four none is held out: both are then the same.

    Raises:
        DataError: fewer than two images can be read, or too many cannot.
    """
    for name in ("limit", "held_out"):
        if getattr(settings, name) < 2:
            raise DataError(f"{name} is a number of images, at least 2, found {getattr(settings, name)}")
    everything = batches(
        images,
        source_of(dense).input,
        size=settings.batch_size,
        limit=settings.limit + settings.held_out,
        seed=settings.seed,
        broken=settings.broken,
        window=settings.window,
        stride=settings.stride,
    ).readable()
    order = list(range(len(everything.items)))
    if len(order) < 2:
        raise DataError(f"compress needs at least 2 readable images, found {len(order)}; some hundred are better")
    random.Random(settings.seed).shuffle(order)
    count = min(settings.held_out, max(2, len(order) // 5))
    if len(order) < 4:
        both = everything.pick(order)
        return both, both, everything.skipped
    used = order[count : count + settings.limit]
    return everything.pick(used), everything.pick(order[:count]), everything.skipped


def _check_possible(anatomy: Anatomy, settings: Settings, budget: Budget) -> None:
    """Refuse before the long steps what no scores could make possible.

    Raises:
        AnatomyError: nothing can be cut.
        BudgetError: no group is of the kinds asked for, the methods are not made for them, or the floors leave more
            than the budget.
    """
    rule, kinds = criteria.get(settings.criterion), settings.kinds
    if not anatomy.cuttable and not anatomy.removable:
        raise AnatomyError("this model has no group that can be cut; `secateur inspect` says why")
    if kinds and not rule.blocks and Kind.BLOCKS in kinds:
        raise BudgetError(
            f"criterion '{settings.criterion}' scores no whole blocks: use block-influence or angular for kinds=blocks "
            "alone; widths are planned apart, and one Plan may hold the groups of both"
        )
    groups = anatomy.removable if rule.blocks else anatomy.cuttable
    have = sorted({str(g.kind) for g in groups.values()})
    if kinds and (unknown := sorted(set(kinds) - set(have))):
        by = f" by '{settings.criterion}'" if rule.blocks else ""
        raise BudgetError(f"no group of kind '{unknown[0]}' can be cut{by}; this model has {', '.join(have) or 'none'}")
    names = [n for n, g in groups.items() if not kinds or str(g.kind) in kinds]
    check_choice(settings.allocator, [groups[n] for n in names])
    scores = Scores(dict.fromkeys(names, torch.empty(0)))
    dense = {"params": anatomy.params, "macs": anatomy.macs, "quality": math.inf}[budget.kind]
    check_reachable(Problem(scores, anatomy, budget.kind, budget.share * dense, settings.floor, settings.align))


def _statistics(
    steps: Steps, dense: nn.Module, anatomy: Anatomy, data: Batches, settings: Settings
) -> Statistics | None:
    """Statistics for the chosen methods, or None if none of them needs any."""
    rule, compensator = criteria.get(settings.criterion), compensators.get(settings.compensator)
    curves = allocators.get(settings.allocator).curves
    if not (rule.data or compensator.data or curves):
        return None
    weighted = rule.weighting or ((curves or compensator.sequential) and "features") or None
    losses = tuple(dict.fromkeys([*rule.losses, *([weighted] if weighted else [])]))
    covariance = rule.covariance or curves or (compensator.data and not rule.blocks)
    losses = tuple(dict.fromkeys([*losses, *rule.weights]))
    options = {
        "loss": losses,
        "weighting": weighted,
        "covariance": covariance,
        "weights": rule.weights,
        "projected": rule.projected,
        "batch_size": settings.batch_size,
        "dtype": settings.dtype,
        "seed": settings.seed,
    }
    statistics = steps.keep(
        "statistics.safetensors",
        Statistics,
        lambda: calibrate(dense, data, anatomy, **options),
    )
    statistics.model, statistics.anatomy = dense, anatomy
    return statistics


def _note_disappointments(result: Result, budget: Budget) -> None:
    """What was asked for and could not quite be had."""
    if all(len(kept.keep) == kept.size for kept in result.plan.groups.values()):
        warnings.warn("nothing was cut: the budget leaves the whole model as it is", SecateurWarning, stacklevel=4)
    elif budget.kind == "quality" and result.fidelity.quality < budget.share:
        warnings.warn(
            f"the finished model's quality is {result.fidelity.quality:.4f}, below the {budget.share} asked for",
            SecateurWarning,
            stacklevel=4,
        )
