"""Secateur makes large pretrained transformers small and fast, without labels.

    import secateur as sc

    model = sc.load_model("timm/vit_small_patch14_reg4_dinov2.lvd142m")
    result = sc.compress(model, "photos/", keep_params=0.75)
    sc.save(result.model, "small/")

Everything is imported on first use: `import secateur` alone loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load_model": "artifact",
    "load": "artifact",
    "save": "artifact",
    "inspect": "api",
    "calibrate": "api",
    "prune": "api",
    "prune_": "api",
    "rotate": "api",
    "shorten": "api",
    "score": "criteria",
    "Scores": "criteria",
    "criterion": "criteria",
    "GroupView": "criteria",
    "allocate": "allocation",
    "allocator": "allocation",
    "Problem": "allocation",
    "compensator": "surgery",
    "mask": "surgery",
    "Budget": "plan",
    "Plan": "plan",
    "Statistics": "calibration",
    "fidelity": "evaluation",
    "knn": "evaluation",
    "perplexity": "evaluation",
    "tasks": "evaluation",
    "latency": "measurement",
    "macs": "measurement",
    "parameters": "measurement",
    "compress": "workflow",
    "Result": "workflow",
    "Batches": "data",
    "batches": "data",
    "source_of": "models",
    "SecateurError": "errors",
}
_LISTS = {
    "list_criteria": ("criteria", "criteria"),
    "list_allocators": ("allocation", "allocators"),
    "list_compensators": ("surgery", "compensators"),
    "list_losses": ("calibration", "losses"),
}

__all__ = ["__version__", *_WHERE, *_LISTS]


def __getattr__(name: str) -> Any:
    if name in _LISTS:
        module, registry = _LISTS[name]
        return getattr(import_module(f"secateur.{module}"), registry).list
    if name in _WHERE:
        return getattr(import_module(f"secateur.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'secateur' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from secateur.allocation import Problem, allocate, allocator
    from secateur.api import calibrate, inspect, prune, prune_, rotate, shorten
    from secateur.artifact import load, load_model, save
    from secateur.calibration import Statistics
    from secateur.criteria import GroupView, Scores, criterion, score
    from secateur.data import Batches, batches
    from secateur.errors import SecateurError
    from secateur.evaluation import fidelity, knn, perplexity, tasks
    from secateur.measurement import latency, macs, parameters
    from secateur.models import source_of
    from secateur.plan import Budget, Plan
    from secateur.surgery import compensator, mask
    from secateur.workflow import Result, compress
