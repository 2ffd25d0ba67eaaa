"""Compensators are the least-squares solutions that they claim to be."""

import pytest
import torch
from torch import nn

import secateur as sc
from conftest import sums_of
from secateur.anatomy import find_anatomy
from secateur.calibration.statistics import Statistics
from secateur.plan import Kept, Plan


class Mlp(nn.Module):
    def __init__(self, bias: bool = True, conv: bool = False) -> None:
        super().__init__()
        make = (lambda i, o, **k: nn.Conv2d(i, o, 1, **k)) if conv else nn.Linear
        self.fc1, self.act, self.fc2 = make(6, 12), nn.ReLU(), make(12, 5, bias=bias)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def hidden(model, x):
    """Activations [T, N] at the consumer's input."""
    with torch.no_grad():
        h = model.act(model.fc1(x))
    return h.flatten(0, -2) if h.dim() < 4 else h.movedim(1, -1).flatten(0, -2)


def setup(bias=True, conv=False):
    torch.manual_seed(0)
    model = Mlp(bias, conv).eval()
    x = torch.randn(40, 6, 4, 4) if conv else torch.randn(40, 16, 6)
    anatomy = find_anatomy(model, x[:2])
    h = hidden(model, x)
    sums = sums_of(h)
    (name,) = anatomy.cuttable
    keep = (0, 1, 3, 4, 7, 8, 11)
    plan = Plan(groups={name: Kept(kind="hidden", size=12, keep=keep)})
    return model, x, anatomy, Statistics(layers={"fc2": sums}, images=40), plan, list(keep)


def outputs(model, x):
    with torch.no_grad():
        y = model(x)
    return y.flatten(0, -2) if y.dim() < 4 else y.movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("conv", [False, True])
def test_affine_is_the_best_affine_map(conv):
    model, x, anatomy, statistics, plan, keep = setup(conv=conv)
    small = sc.prune(model, plan, anatomy=anatomy, stats=statistics, compensate="affine", ridge=1e-9)
    h = torch.cat([hidden(model, x)[:, keep], torch.ones(hidden(model, x).shape[0], 1)], 1).double()
    y = outputs(model, x).double()
    best = h @ torch.linalg.lstsq(h, y).solution
    torch.testing.assert_close(outputs(small, x).double(), best, rtol=1e-3, atol=1e-3)


def test_ridge_is_the_best_linear_map_and_leaves_the_bias():
    model, x, anatomy, statistics, plan, keep = setup()
    small = sc.prune(model, plan, anatomy=anatomy, stats=statistics, compensate="ridge", ridge=1e-9)
    torch.testing.assert_close(small.fc2.bias, model.fc2.bias)
    h = hidden(model, x).double()
    target = h @ model.fc2.weight.T.double().detach()
    best = h[:, keep] @ torch.linalg.lstsq(h[:, keep], target).solution
    torch.testing.assert_close(
        outputs(small, x).double() - model.fc2.bias.double().detach(), best, rtol=1e-3, atol=1e-3
    )


def test_mean_replaces_removed_units_by_their_means():
    model, x, anatomy, statistics, plan, keep = setup()
    small = sc.prune(model, plan, anatomy=anatomy, stats=statistics, compensate="mean")
    h = hidden(model, x)
    gone = [i for i in range(12) if i not in keep]
    h[:, gone] = h[:, gone].mean(0)
    torch.testing.assert_close(outputs(small, x), model.fc2(h).detach(), rtol=1e-4, atol=1e-5)


def test_errors_fall_in_the_expected_order():
    model, x, anatomy, statistics, plan, _keep = setup()
    errors = {
        name: float(
            (outputs(sc.prune(model, plan, anatomy=anatomy, stats=statistics, compensate=name), x) - outputs(model, x))
            .square()
            .mean()
        )
        for name in ("none", "mean", "ridge", "affine")
    }
    assert errors["affine"] < errors["ridge"] < errors["none"]
    assert errors["affine"] < errors["mean"] < errors["none"]


def test_bias_is_added_only_where_it_may_be():
    model, x, anatomy, statistics, plan, _keep = setup(bias=False)
    free = sc.prune(model, plan, anatomy=anatomy, stats=statistics, compensate="affine")
    assert free.fc2.bias is not None
    assert model.fc2.bias is None
    strict = sc.prune(model, plan, anatomy=anatomy, stats=statistics, compensate="affine", add_bias=False)
    assert strict.fc2.bias is None
    better = (outputs(free, x) - outputs(model, x)).square().mean()
    worse = (outputs(strict, x) - outputs(model, x)).square().mean()
    assert better < worse


def test_without_statistics_the_error_says_so():
    model, _x, anatomy, _statistics, plan, _keep = setup()
    with pytest.raises(sc.SecateurError, match="needs statistics; calibrate first, or use compensate='none'"):
        sc.prune(model, plan, anatomy=anatomy, compensate="affine")


def test_singular_covariance_is_survived():
    """Copies and dead units make the covariance singular; the regression still works."""
    model, _x, anatomy, statistics, plan, _keep = setup()
    sums = statistics.layers["fc2"]
    sums.outer[:] = 0
    sums.first[:] = 0
    small = sc.prune(model, plan, anatomy=anatomy, stats=statistics, compensate="affine", ridge=0.0)
    assert all(torch.isfinite(p).all() for p in small.parameters())
