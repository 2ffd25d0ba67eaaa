"""AMP's search: the cached one decides as the naive one does, with far less work."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.allocation.amp_bisect import Search
from secateur.allocation.base import Problem


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    shape = {"img_size": 32, "depth": 6, "num_classes": 0, "init_values": 1.0}
    model = sc.load_model("timm/vit_tiny_patch16_224", pretrained=False, **shape)
    anatomy = sc.inspect(model)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    statistics = sc.calibrate(model, images, anatomy, loss="entropy")
    return model, anatomy, sc.batches(images, sc.source_of(model).image, size=8), sc.score(statistics, "amp")


def problem_of(setting, **options):
    model, anatomy, data, scores = setting
    return Problem(scores, anatomy, "params", float("inf"), floor=0.1, align=8, options=options, model=model, data=data)


def work(search, problem, tolerance):
    """Multiply-accumulates of a search, and what it found."""
    with FlopCounterMode(display=False) as counter:
        found = search.run(problem, tolerance, 5)
    return counter.get_total_flops(), found


@pytest.mark.parametrize(("kinds", "tolerance", "share"), [({"hidden"}, 1e-4, 0.53), ({"hidden", "heads"}, 1e-6, 0.58)])
def test_cached_search_returns_the_naive_widths_with_half_the_work(setting, kinds, tolerance, share):
    """Half, and of each block the first run; of attention, its products too."""
    problem = problem_of(setting)
    problem = replace(problem, data=problem.data.pick(range(8)))
    values = {n: v for n, v in problem.scores.values.items() if str(problem.anatomy.groups[n].kind) in kinds}
    problem = replace(problem, scores=replace(problem.scores, values=values))
    naive, a = work(Search.of(problem, cached=False), problem, tolerance)
    cached, b = work(Search.of(problem, cached=True), problem, tolerance)
    assert a == b
    assert any(a[g.name] < g.size for g in problem.groups)
    assert cached < share * naive


def test_larger_tolerance_cuts_more(setting):
    problem = problem_of(setting)
    search = Search.of(problem)
    few, many = (sum(search.run(problem, t, 4).values()) for t in (1e-2, 1e-7))
    assert few <= many


def test_the_model_is_untouched(setting):
    model = setting[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Search.of(problem_of(setting)).run(problem_of(setting), 1e-4, 3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


def test_through_allocate_with_a_budget(setting):
    model, anatomy, data, scores = setting
    plan = sc.allocate(scores, 0.7, "amp-bisect", anatomy=anatomy, model=model, data=data, steps=3, rounds=4)
    share = plan.predicted["params"] / plan.predicted["dense_params"]
    assert 0.69 < share <= 0.7


def test_needs_model_and_images(setting):
    with pytest.raises(sc.SecateurError, match="measures the model: give allocate"):
        sc.allocate(setting[3], 0.7, "amp-bisect")
