"""What `compress` was asked to do, and what it made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from secateur import __version__
from secateur.anatomy import Kind
from secateur.criteria import criteria
from secateur.errors import BudgetError
from secateur.evaluation import Fidelity
from secateur.measurement import Timing, macs, parameters
from secateur.plan import Budget, Plan

# How whole blocks are chosen, where nothing else is said.
DEPTH = {"criterion": "block-influence", "allocator": "uniform"}


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
    batch_size: int | None = None
    window: int = 256
    stride: int | None = None
    floor: float = 0.1
    align: int = 8
    uniform_width: bool = False
    ridge: float = 1e-3
    dtype: str = "float32"
    broken: float = 0.1
    seed: int = 0
    memory_budget: str | None = None

    @classmethod
    def of(cls, **settings: Any) -> Settings:
        """The settings, with the methods for whole blocks as defaults where only those are asked for."""
        given = {name: value for name, value in settings.items() if value is not None}
        criterion = given.get("criterion")
        if criteria.get(criterion).blocks if criterion else tuple(given.get("kinds", ())) == (Kind.BLOCKS,):
            given = {**DEPTH, **given}
        return cls(**given)

    def budget(self) -> Budget:
        """The budget asked for.

        Raises:
            BudgetError: none or several were given, or one is out of range.
        """
        given = {"params": self.keep_params, "macs": self.keep_macs, "quality": self.min_quality}
        given = {k: v for k, v in given.items() if v is not None}
        if len(given) != 1:
            raise BudgetError(
                "give exactly one of keep_params, keep_macs and min_quality, for example keep_params=0.75 "
                "(--keep-params 0.75)"
            )
        return Budget(**given)


@dataclass
class Result:
    """What `compress` made.

    Attributes:
        model: the small model.
        plan: which units were kept.
        fidelity: to the dense model.
        held_out: whether that was measured on images not used for calibration.
        table: rows of (quantity, dense, cut, ratio).
        timings: latency of both models.
        skipped: images that could not be read, with the reason.
        reused: steps taken up from an interrupted run.
        settings: as asked.
    """

    model: nn.Module
    plan: Plan
    fidelity: Fidelity
    held_out: bool
    table: list[tuple[str, float, float, float]]
    timings: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)

    def figures(self) -> dict[str, Any]:
        """Everything measured, JSON-able."""
        return {
            "secateur": __version__,
            "settings": asdict(self.settings),
            "table": [{"quantity": q, "dense": d, "cut": c, "ratio": r} for q, d, c, r in self.table],
            "fidelity": {**self.fidelity.to_dict(), "held_out": self.held_out},
            "timings": {k: asdict(v) for k, v in self.timings.items()},
            "skipped": self.skipped,
        }


def table(dense: nn.Module, small: nn.Module, timings: dict[str, Timing]) -> list[tuple[str, float, float, float]]:
    """Rows (quantity, dense, cut, cut / dense)."""
    rows = [
        ("parameters", float(parameters(dense)), float(parameters(small))),
        ("MACs per image", macs(dense), macs(small)),
    ]
    if timings:
        a, b = timings["dense"], timings["cut"]
        rows.append(("latency, batch 8 (ms)", a.median_ms, b.median_ms))
        rows.append(("images per second", a.images_per_second, b.images_per_second))
    return [(name, d, c, c / d) for name, d, c in rows]
