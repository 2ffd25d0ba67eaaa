"""One model: find its groups, cut them all at once, and compare the masked model with the sliced one."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.anatomy import CUT_KINDS, Anatomy, find_anatomy
from secateur.anatomy.verify import randomise_
from secateur.nn.trees import tensors_in
from secateur.plan import Kept, Plan
from secateur.surgery import mask, prune

TOLERANCE = 1e-5  # of the largest absolute output
BLIND = 1e-3  # masking must move the outputs by at least this, or the comparison says nothing


def two_thirds(anatomy: Anatomy) -> Plan:
    """A plan that keeps about 2/3 of the units, picked at random, of every group that can be cut."""
    groups = {}
    for i, (name, group) in enumerate(anatomy.cuttable.items()):
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(i)).tolist()
        keep = sorted(order[: group.at_most(-(-2 * group.size // 3))])
        groups[name] = Kept(kind=str(group.kind), size=group.size, keep=tuple(keep))
    return Plan(groups=groups)


def check(model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any]) -> dict[str, Any]:
    """Everything the table says about one model.

    Args:
        model: freshly built; it is randomised here.
        example: its input.
        forward: how to call it.

    Returns:
        A JSON-able row; `status` is "pass", "fail" or "not applicable", `reason` says why.
    """

    def run(module: nn.Module, batch: Any) -> Any:
        torch.manual_seed(0)  # masked autoencoders draw their mask anew in every run
        return forward(module, batch)

    model.eval()
    randomise_(model)
    model, example, dtype = _widest(model, example, run)
    start = time.perf_counter()
    anatomy = find_anatomy(model, example, run)
    seconds = time.perf_counter() - start
    plan = two_thirds(anatomy)
    masked = mask(model, plan, anatomy)
    small = prune(model, plan, anatomy=anatomy, compensate="none")
    with torch.no_grad():
        dense_out, masked_out, small_out = (_floats(run(m, example)) for m in (model, masked, small))
    difference, effect = _distance(masked_out, small_out), _distance(dense_out, masked_out)
    counted = anatomy.params_after(plan.kept())
    real = sum(p.numel() for p in small.parameters())
    row = {
        "params": anatomy.params,
        "dtype": dtype,
        "groups": dict(Counter(str(g.kind) for g in anatomy.cuttable.values())),
        "refused": _refusals(anatomy),
        "share": 1 - anatomy.params_after(dict.fromkeys(anatomy.cuttable, 0)) / max(anatomy.params, 1),
        "difference": difference,
        "effect": effect,
        "inspect_s": round(seconds, 1),
    }
    return row | _verdict(anatomy, difference, effect, counted, real)


def _verdict(anatomy: Anatomy, difference: float, effect: float, counted: int, real: int) -> dict[str, str]:
    if not any(g.kind in CUT_KINDS for g in anatomy.groups.values()):
        return {"status": "not applicable", "reason": "no hidden dimension between two layers: all are stream widths"}
    if not anatomy.cuttable:
        return {"status": "fail", "reason": "nothing can be cut"}
    if not difference <= TOLERANCE:
        return {"status": "fail", "reason": f"sliced differs from masked by {difference:.1e}"}
    if not effect >= BLIND:
        return {"status": "fail", "reason": f"the comparison is blind: masking moves the outputs by {effect:.1e}"}
    if counted != real:
        return {"status": "fail", "reason": f"{counted} parameters predicted, {real} left"}
    return {"status": "pass", "reason": ""}


def _widest(model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any]) -> tuple[nn.Module, Any, str]:
    """Model and example in float64 if the model runs in it, else as they are."""
    try:
        wide = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example)
        with torch.no_grad():
            forward(model.double(), wide)
        return model, wide, "float64"
    except Exception:  # whatever the model does not like about float64; float32 is what it was made for
        return model.float(), example, "float32"


def _floats(out: Any) -> list[Tensor]:
    return [t.detach() for t in tensors_in(out) if t.is_floating_point() and t.numel()]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference, of any output, relative to that output's largest value; inf where they do not match."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        finite = x.isfinite()  # masked detections are -inf in both
        if not torch.equal(finite, y.isfinite()) or not finite.any():
            return float("nan")
        x, y = x[finite], y[finite]
        worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-12)))
    return worst


def _refusals(anatomy: Anatomy) -> dict[str, int]:
    """How many groups each reason kept from being cut, module paths left out."""
    where = re.compile(r" in [^ ]+ \(")
    reasons = Counter(f"{g.kind}: {where.sub(' in (', g.reason)}" for g in anatomy.groups.values() if not g.cuttable)
    return dict(reasons.most_common())
