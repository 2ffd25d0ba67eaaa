"""How much memory there may be, what streaming will need, and which methods can do with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from secateur.allocation import allocators
from secateur.anatomy import Anatomy
from secateur.criteria import criteria
from secateur.errors import BudgetError
from secateur.plan import Budget
from secateur.streaming.model import Streamed, within
from secateur.surgery import compensators

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# Square float64 matrices of a layer's inputs that scoring and refitting hold at once, beside the float32 sums.
_WORK = 6
STATES = 1 / 8  # share of the budget for hidden states; those beyond it are kept on disk


def parse_bytes(text: str | int | float) -> int:
    """Bytes of "6GB", "512 MiB" or a number.

    Raises:
        BudgetError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", str(text), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise BudgetError(f"memory budget '{text}' is no size; give one like 6GB or 512MiB")
    return size


def needs_gradients(criterion: str) -> bool:
    """Whether a criterion reads gradients; those that only weigh positions by them do without."""
    rule = criteria.get(criterion)
    return bool(rule.weights or set(rule.losses) - {rule.weighting})


def check_methods(criterion: str, allocator: str, budget: Budget) -> None:
    """Refuse methods that need the whole model at once.

    Raises:
        BudgetError: with those that do not.
    """
    if needs_gradients(criterion):
        forward = ", ".join(name for name in criteria.list() if not needs_gradients(name))
        raise BudgetError(
            f"criterion '{criterion}' runs backward through the whole model, which a memory budget does not leave room "
            f"for; give one that runs forward only ({forward}), or no memory budget"
        )
    if allocators.get(allocator).measures:
        others = ", ".join(name for name in allocators.list() if not allocators.get(name).measures)
        raise BudgetError(
            f"allocator '{allocator}' runs the whole model, which a memory budget does not leave room for; give one of "
            f"{others}, or no memory budget"
        )
    if budget.kind == "quality":
        raise BudgetError(
            "a quality is searched by cutting whole models; with a memory budget give keep_params or keep_macs"
        )


def check_fits(
    source: Streamed, anatomy: Anatomy, memory: int, *, criterion: str, compensator: str, curves: bool, logits: int
) -> None:
    """Refuse a budget that the largest block, or the head, is too large for.

    Args:
        memory: the budget in bytes.
        logits: numbers that the model predicts for a batch.

    Raises:
        BudgetError: with what is needed.
    """
    # Largest of: a block and its sums, and the work on them; what is in no block, and what it predicts.
    covariance = criteria.get(criterion).covariance or compensators.get(compensator).data or curves
    now = resident()
    needs = {}
    for path in anatomy.blocks:
        widths = {c.module: len(c.units) for g in within(anatomy, path).groups.values() for c in g.consumers}
        squares = [n * n for n in widths.values()] if covariance else []
        weights = source.bytes_of(source.names_in(path))
        needs[path] = 2 * weights + 4 * sum(squares) + 8 * _WORK * max(squares, default=0)
    rest = source.outside(anatomy.blocks)
    needs["what is in no block"] = source.bytes_of(rest) + 4 * 4 * logits
    where, most = max(needs.items(), key=lambda item: item[1])
    total = (now + most) / (1 - STATES)
    if total > memory:
        raise BudgetError(
            f"a memory budget of {_shown(memory)} is too small: Python and its libraries hold {_shown(now)}, and "
            f"{where} needs {_shown(most)} more; give at least {_shown(1.05 * total)}, or fewer tokens a batch "
            "(window=, batch_size=)"
        )


def resident() -> int:
    """Bytes of memory that this process holds now, where the system tells."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def _shown(size: float) -> str:
    return f"{size / 1e9:.1f}GB" if size >= 1e8 else f"{size / 1e6:.0f}MB"
