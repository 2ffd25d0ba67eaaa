"""Scoring every group of a model, and what the scores predict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Anatomy, Kind
from secateur.calibration.statistics import Statistics
from secateur.criteria.base import Criterion, GroupView, criteria
from secateur.criteria.curves import error_curve
from secateur.errors import DataError
from secateur.fingerprint import fingerprint
from secateur.progress import track
from secateur.tensorfile import read_tensors, write_tensors


@dataclass
class Scores:
    """One number per unit, and how the error grows as units go.

    Attributes:
        values: by group, [U], higher = keep.
        curves: by group, [U + 1], predicted error of the features when the best k units stay and the consumer is
            refit; only where covariances and gradients were collected.
        meta: criterion, options and fingerprint of the model.
        anatomy: of the model (not saved).
        blocks: [L, 2], how far each block of the model turns the stream, as 1 - cosine and as an angle in units of pi;
            empty if not collected.
        between: by group of whole blocks, [U + 1, U + 1], how far the stream turns from before block i to before
            block j.
    """

    values: dict[str, Tensor]
    curves: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    anatomy: Anatomy | None = field(default=None, repr=False)
    blocks: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    between: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write safetensors; atomic."""
        tensors = {f"value|{k}": v for k, v in self.values.items()}
        tensors |= {f"curve|{k}": v for k, v in self.curves.items()}
        tensors |= {"blocks": self.blocks} if self.blocks.numel() else {}
        tensors |= {f"between|{k}": v for k, v in self.between.items()}
        write_tensors(path, "scores", self.meta, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged, or not scores.
        """
        return read_tensors(path, "scores", cls._of, "score again")

    @classmethod
    def _of(cls, meta: dict[str, Any], tensors: dict[str, Tensor]) -> Scores:
        parts: dict[str, dict[str, Tensor]] = {"value": {}, "curve": {}, "between": {}}
        blocks = tensors.pop("blocks", torch.empty(0))
        for name, tensor in tensors.items():
            kind, _, group = name.partition("|")
            parts[kind][group] = tensor
        return cls(parts["value"], parts["curve"], meta, blocks=blocks, between=parts["between"])


def score(
    statistics: Statistics | None,
    criterion: str = "obs",
    *,
    model: nn.Module | None = None,
    anatomy: Anatomy | None = None,
    groups: Iterable[str] | None = None,
    seed: int = 0,
    curves: bool = True,
    **options: float | str,
) -> Scores:
    """Score every cuttable group of a model: with a criterion of whole blocks its stacks, else all others.

    Args:
        statistics: of this model; None for criteria that need no data.
        criterion: a name from `list_criteria()`.
        model, anatomy: those of the calibration by default; needed when statistics were loaded from a file.
        groups: names to score; all cuttable ones by default.
        curves: also predict the error at every width, which takes longer than most criteria.
        options: of the criterion, as its docstring names them.

    Raises:
        RegistryError: no such criterion, or no such option of it.
        DataError: the statistics lack what the criterion needs, or belong to another model.
    """
    rule: Criterion = criteria.get(criterion)
    criteria.check_options(criterion, options, rule.options)
    model = model if model is not None else getattr(statistics, "model", None)
    anatomy = anatomy if anatomy is not None else getattr(statistics, "anatomy", None)
    if model is None or anatomy is None:
        raise DataError("give model= and anatomy= along with statistics that were loaded from a file")
    if rule.data and statistics is None:
        raise DataError(
            f"criterion '{criterion}' needs statistics; calibrate first, or use a data-free one (magnitude, dgmr)"
        )
    mark = fingerprint(model)
    if statistics is not None and statistics.meta.get("fingerprint", mark) != mark:
        raise DataError("these statistics belong to another model, or to other weights; calibrate this one")
    out = Scores({}, meta={"criterion": criterion, "options": options, "fingerprint": mark}, anatomy=anatomy)
    if statistics is not None and statistics.stream is not None and float(statistics.stream.count) > 0:
        out.blocks = statistics.stream.turns
    every = anatomy.removable if rule.blocks else anatomy.cuttable
    wanted = set(every if groups is None else groups)
    todo = [g for n, g in every.items() if n in wanted]
    for group in track(todo, f"Scoring ({criterion})"):
        view = GroupView(group, model, statistics, seed, dict(options), anatomy.blocks)
        unread = rule.blocks or (rule.moments and group.kind is Kind.QK_DIM)
        if rule.data and not unread and not any(r.sums is not None for r in view.readings()):
            continue  # not observable: stays whole
        values = rule.score(view).float()
        if not torch.isfinite(values).all():
            raise DataError(
                f"criterion '{criterion}' gave NaN or infinite scores for '{group.name}'; check the weights"
            )
        out.values[group.name] = values
        if rule.between is not None:
            out.between[group.name] = rule.between(view).float()
            continue
        curve = error_curve(view, values) if curves else None
        if curve is not None:
            out.curves[group.name] = curve
    return out
