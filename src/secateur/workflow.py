"""`compress`: the whole pipeline in one call, resumable."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from secateur import __version__
from secateur.allocation import Budget, allocate, allocators
from secateur.anatomy import Anatomy
from secateur.api import calibrate, inspect, prune
from secateur.artifact import load_model, save
from secateur.calibration import Statistics
from secateur.criteria import Scores, criteria, score
from secateur.data import Batches, batches
from secateur.errors import ArtifactError, BudgetError, SecateurError
from secateur.evaluation import Fidelity, fidelity
from secateur.files import atomic_file
from secateur.fingerprint import fingerprint
from secateur.measurement import Timing, latency, macs, parameters
from secateur.models import source_of
from secateur.plan import Plan
from secateur.surgery import compensators, recipe_of


@dataclass(frozen=True)
class Settings:
    """What `compress` was asked to do; saved with the result. See `compress` for the meaning of each."""

    keep_params: float | None = None
    keep_macs: float | None = None
    min_quality: float | None = None
    criterion: str = "obs"
    allocator: str = "curve"
    compensator: str = "sequential"
    kinds: tuple[str, ...] | None = None
    limit: int = 512
    held_out: int = 128
    batch_size: int = 16
    floor: float = 0.1
    align: int = 8
    uniform_width: bool = False
    ridge: float = 1e-3
    dtype: str = "float32"
    broken: float = 0.1
    seed: int = 0

    def budget(self) -> Budget:
        """The budget asked for.

        Raises:
            BudgetError: none or several were given, or one is out of range.
        """
        given = {"params": self.keep_params, "macs": self.keep_macs, "quality": self.min_quality}
        given = {k: v for k, v in given.items() if v is not None}
        if len(given) != 1:
            raise BudgetError(
                "give exactly one of keep_params, keep_macs and min_quality, for example keep_params=0.75"
            )
        return Budget(**given)


@dataclass
class Result:
    """What `compress` made.

    Attributes:
        model: the small model.
        plan: which units were kept.
        fidelity: to the dense model, on images not used for calibration.
        table: rows of (quantity, dense, cut, ratio).
        timings: latency of both models.
        skipped: images that could not be read, with the reason.
        settings: as asked.
    """

    model: nn.Module
    plan: Plan
    fidelity: Fidelity | None
    table: list[tuple[str, float, float, float]]
    timings: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)

    def figures(self) -> dict[str, Any]:
        """Everything measured, JSON-able."""
        return {
            "secateur": __version__,
            "settings": asdict(self.settings),
            "table": [{"quantity": q, "dense": d, "cut": c, "ratio": r} for q, d, c, r in self.table],
            "fidelity": None if self.fidelity is None else self.fidelity.to_dict(),
            "timings": {k: asdict(v) for k, v in self.timings.items()},
            "skipped": self.skipped,
        }


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
        images: unlabeled images, anything `batches` takes; a part is held out for evaluation.
        out: folder to save to.
        resume: take up finished steps of an interrupted run with the same settings (needs `out`).
        measure: time both models.
        model_options: passed to `load_model`.
        settings:
            keep_params, keep_macs: share to keep; or min_quality: lowest cosine to the dense features.
            criterion, allocator, compensator: names from the registries.
            kinds: cut only groups of these kinds.
            limit, held_out: at most so many images for calibration and for evaluation.
            batch_size, dtype, seed, broken: of the calibration.
            floor, align, uniform_width: of the allocation.
            ridge: of the compensation.

    Raises:
        SecateurError: whatever goes wrong, in one line that says what to do.
    """
    try:
        wanted = Settings(**settings)
    except TypeError as e:
        raise SecateurError(f"unknown setting: {e}; see help(secateur.compress)") from e
    budget = wanted.budget()
    for registry, name in (
        (criteria, wanted.criterion),
        (allocators, wanted.allocator),
        (compensators, wanted.compensator),
    ):
        registry.get(name)
    dense = load_model(model, **(model_options or {}))
    work = _Work(Path(out) if out else None, resume, dense, wanted)
    calibration, held_out = split(images, dense, wanted)
    anatomy = inspect(dense)
    statistics = _statistics(work, dense, anatomy, calibration, wanted)
    scores = work.keep(
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
        few = pick(calibration, range(min(128, len(calibration.items))))
        return fidelity(cut(plan, few), dense, held_out).cls_cosine

    plan = work.keep(
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
    result = Result(small, plan, fidelity(small, dense, held_out), [], settings=wanted)
    result.skipped = {**(statistics.skipped if statistics else {}), **calibration.skipped, **held_out.skipped}
    result.timings = latency({"dense": dense, "cut": small}) if measure else {}
    result.table = table(dense, small, result.timings)
    if out is not None:
        save(small, out, figures=result.figures())
        work.finish()
    return result


def split(images: Any, dense: nn.Module, settings: Settings) -> tuple[Batches, Batches]:
    """Calibration and held-out images, disjoint, drawn with the seed; at least a fifth is held out."""
    everything = batches(images, source_of(dense).image, size=settings.batch_size, broken=settings.broken)
    order = list(range(len(everything.items)))
    random.Random(settings.seed).shuffle(order)
    count = min(settings.held_out, max(2, len(order) // 5))
    if len(order) < 4:
        held, used = order, order  # too few to hold any out: the figures are then those of the calibration images
    else:
        held, used = order[:count], order[count : count + settings.limit]

    return pick(everything, used), pick(everything, held)


def pick(data: Batches, indices: Sequence[int]) -> Batches:
    """Some of the images, in the order given."""
    labels = None if data.labels is None else [data.labels[i] for i in indices]
    return Batches([data.items[i] for i in indices], data.spec, data.size, labels, broken=data.broken)


def _statistics(
    work: _Work, dense: nn.Module, anatomy: Anatomy, data: Batches, settings: Settings
) -> Statistics | None:
    """Statistics for the chosen methods, or None if none of them needs any."""
    rule, compensator = criteria.get(settings.criterion), compensators.get(settings.compensator)
    curves = allocators.get(settings.allocator).curves
    if not (rule.data or compensator.data or curves):
        return None
    weighted = rule.weighting or ((curves or compensator.sequential) and "features") or None
    losses = tuple(dict.fromkeys([*rule.losses, *([weighted] if weighted else [])]))
    covariance = rule.covariance or compensator.data or curves

    def run() -> Statistics:
        return calibrate(
            dense,
            data,
            anatomy,
            loss=losses,
            weighting=weighted,
            covariance=covariance,
            batch_size=settings.batch_size,
            dtype=settings.dtype,
            seed=settings.seed,
        )

    statistics = work.keep("statistics.safetensors", Statistics, run)
    statistics.model, statistics.anatomy = dense, anatomy
    return statistics


def table(dense: nn.Module, small: nn.Module, timings: dict[str, Timing]) -> list[tuple[str, float, float, float]]:
    """Rows (quantity, dense, cut, cut / dense)."""
    rows = [
        ("parameters (M)", parameters(dense) / 1e6, parameters(small) / 1e6),
        ("MACs per image (G)", macs(dense) / 1e9, macs(small) / 1e9),
    ]
    if timings:
        a, b = timings["dense"], timings["cut"]
        rows.append(("latency, batch 8 (ms)", a.median_ms, b.median_ms))
        rows.append(("throughput (images/s)", a.images_per_second, b.images_per_second))
    return [(name, d, c, c / d) for name, d, c in rows]


class _Work:
    """Finished steps of a run, beside its output folder, so that an interrupted run can go on."""

    def __init__(self, out: Path | None, resume: bool, dense: nn.Module, settings: Settings) -> None:
        self.folder = None if out is None else out.with_name(out.name + ".work")
        if resume and out is None:
            raise SecateurError("resume needs out=, the folder of the run to go on with")
        if self.folder is None:
            return
        if recipe_of(dense).shapes:
            raise ArtifactError("the model was cut before; compress the dense one")
        key = json.dumps([fingerprint(dense), asdict(settings)], sort_keys=True)
        mark = hashlib.sha256(key.encode()).hexdigest()
        file = self.folder / "run.json"
        same = file.is_file() and json.loads(file.read_text()).get("run") == mark
        if self.folder.exists() and not (resume and same):
            if resume or not file.is_file():
                raise ArtifactError(
                    f"'{self.folder}' belongs to a run with other settings or another model; remove it, "
                    "or run without resume"
                )
            shutil.rmtree(self.folder)
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps({"run": mark}))

    def keep(self, name: str, kind: Any, make: Callable[[], Any]) -> Any:
        """The result of a step: read if an earlier run left it, else made and written."""
        if self.folder is None:
            return make()
        path = self.folder / name
        if path.is_file():
            return kind.load(path)
        value = make()
        value.save(path)
        return value

    def finish(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
