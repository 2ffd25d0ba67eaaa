"""Allocators: budgets are met, floors and alignment hold, and `curve` finds the true minimum."""

import itertools

import pytest
import torch

import secateur as sc
from secateur.allocation import allocators
from secateur.allocation.base import Problem
from secateur.allocation.curve import solve
from secateur.anatomy import Anatomy, Kind, PrunableGroup
from secateur.anatomy.types import AxisUse, CostTerm
from secateur.criteria import Scores


def make(sizes, unit_costs, seed=0, kind=Kind.HIDDEN):
    """An anatomy of independent groups, with scores and convex-ish random curves."""
    generator = torch.Generator().manual_seed(seed)
    groups, terms, values, curves = {}, [CostTerm(1000.0, ())], {}, {}
    for i, (size, cost) in enumerate(zip(sizes, unit_costs, strict=True)):
        name = f"b{i}:{kind}"
        groups[name] = PrunableGroup(
            name=name, kind=kind, size=size, owner=f"b{i}", slots=(), order=i, unit_params=cost, unit_macs=2 * cost
        )
        terms.append(CostTerm(float(size * cost), (AxisUse(size, ((name, 1),)),)))
        values[name] = torch.rand(size, generator=generator)
        steps = torch.rand(size, generator=generator, dtype=torch.double) * 10 ** torch.rand(1, generator=generator)
        curves[name] = torch.cat([steps.sort().values.cumsum(0).flip(0), torch.zeros(1, dtype=torch.double)])
    total = int(sum(t.amount for t in terms))
    macs = tuple(CostTerm(2 * t.amount, t.axes) for t in terms)
    anatomy = Anatomy(groups, total, 2.0 * total, tuple(terms), macs)
    return Scores(values, curves, {"criterion": "random"}, anatomy)


@pytest.mark.parametrize("method", ["uniform", "global", "curve"])
@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("share", [0.9, 0.55, 0.3])
def test_budget_floor_and_alignment(method, kind, share):
    scores = make([64, 64, 128, 40], [50, 50, 30, 80])
    plan = sc.allocate(scores, sc.Budget(**{kind: share}), method, floor=0.1, align=8)
    assert plan.predicted[kind] <= share * plan.predicted[f"dense_{kind}"]
    for kept in plan.groups.values():
        assert len(kept.keep) % 8 == 0 or len(kept.keep) == kept.size
        assert len(kept.keep) >= 0.1 * kept.size


@pytest.mark.parametrize("method", ["uniform", "global", "curve"])
def test_budget_is_nearly_used_up(method):
    scores = make([512, 512, 768], [50, 50, 30])
    plan = sc.allocate(scores, 0.6, method, align=8)
    assert plan.predicted["params"] > 0.585 * plan.predicted["dense_params"]


@pytest.mark.parametrize("seed", range(6))
def test_curve_is_the_exact_minimum(seed):
    scores = make([5, 4, 6, 3], [10, 25, 7, 40], seed=seed, kind=Kind.HEADS)
    anatomy = scores.anatomy
    problem = Problem(scores, anatomy, "params", 0.0, floor=0.0, align=1)
    budget = 150.0
    kept = solve(problem, budget)
    best = min(
        sum(float(scores.curves[g.name][k]) for g, k in zip(problem.groups, ks, strict=True))
        for ks in itertools.product(*(range(1, g.size + 1) for g in problem.groups))
        if sum(g.unit_params * k for g, k in zip(problem.groups, ks, strict=True)) <= budget
    )
    assert sum(g.unit_params * kept[g.name] for g in problem.groups) <= budget
    assert sum(float(scores.curves[n][k]) for n, k in kept.items()) == pytest.approx(best)


def test_curve_on_a_grid_stays_within_the_budget(monkeypatch):
    """Where the exact set of states is thinned, the plan is feasible and next to optimal."""
    from secateur.allocation import curve

    scores = make([64] * 6, [11.0, 13.7, 17.3, 19.1, 23.9, 29.3], seed=3)
    exact = sc.allocate(scores, 0.5, "curve", align=1)
    monkeypatch.setattr(curve, "LIMIT", 500)
    thin = sc.allocate(scores, 0.5, "curve", align=1)
    assert thin.predicted["params"] <= 0.5 * thin.predicted["dense_params"]

    def error(plan):
        return sum(float(scores.curves[n][k]) for n, k in plan.kept().items())

    assert error(exact) <= error(thin) <= 1.05 * error(exact)


def test_global_keeps_the_units_worth_most_per_cost():
    scores = make([16, 16], [10, 10])
    scores.values = {n: v + i for i, (n, v) in enumerate(scores.values.items())}  # the second group is better
    plan = sc.allocate(scores, 1200 / 1320, "global", align=1, floor=0, standardise="none")
    first, second = plan.groups.values()
    assert len(second.keep) == 16
    everything = torch.cat(list(scores.values.values()))
    removed = 16 - len(first.keep)
    assert set(range(16)) - set(first.keep) == set(everything[:16].argsort()[:removed].tolist())


def test_uniform_width_gives_equal_counts_within_a_class():
    scores = make([64, 64, 64, 128], [50, 50, 50, 30])
    for method in ("global", "curve"):
        plan = sc.allocate(scores, 0.5, method, uniform_width=True)
        counts = [len(k.keep) for k in plan.groups.values()]
        assert len(set(counts[:3])) == 1
        assert plan.predicted["params"] <= 0.5 * plan.predicted["dense_params"]


def test_whole_budget_keeps_everything():
    for method in ("uniform", "global", "curve"):
        plan = sc.allocate(make([64, 40], [50, 30]), 1.0, method)
        assert all(len(k.keep) == k.size for k in plan.groups.values())


@pytest.mark.parametrize("bad", [0, -0.5, 1.5, float("nan")])
def test_senseless_budgets_are_refused(bad):
    with pytest.raises(sc.SecateurError, match="bad budget"):
        sc.Budget(params=bad)


def test_two_budgets_are_refused():
    with pytest.raises(sc.SecateurError, match="exactly one"):
        sc.Budget(params=0.5, macs=0.5)


@pytest.mark.parametrize("method", ["uniform", "global", "curve"])
def test_unreachable_budget_says_what_can_be_reached(method):
    with pytest.raises(sc.SecateurError, match=r"cannot be reached.*floor of 50%.*at least|lower floor or align"):
        sc.allocate(make([64, 64], [50, 50]), 0.2, method, floor=0.5)


def test_kinds_are_respected_and_checked():
    scores = make([64, 64], [50, 50])
    with pytest.raises(sc.SecateurError, match="no scored group is of kind heads; this model has hidden"):
        sc.allocate(scores, 0.5, "uniform", kinds=["heads"])


def test_quality_budget_finds_the_smallest_good_plan():
    scores = make([256, 256], [50, 50])
    plan = sc.allocate(
        scores,
        sc.Budget(quality=0.7),
        "uniform",
        quality_of=lambda p: p.predicted["params"] / p.predicted["dense_params"],
    )
    share = plan.predicted["params"] / plan.predicted["dense_params"]
    assert 0.7 <= share <= 0.73


def test_group_smaller_than_the_alignment_stays_whole():
    plan = sc.allocate(make([6, 256], [50, 50]), 0.5, "uniform", align=8)
    assert len(plan.groups["b0:hidden"].keep) == 6


def test_every_allocator_is_listed():
    assert sc.list_allocators() == ["amp-bisect", "cfsp", "contiguous", "curve", "flap", "global", "modegpt", "uniform"]
    assert allocators.get("curve").curves
