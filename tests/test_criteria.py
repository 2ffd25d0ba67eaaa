"""Criteria against brute force on tiny layers."""

import itertools

import pytest
import torch
from torch import nn

import secateur as sc
from conftest import sums_of
from secateur.anatomy import find_anatomy
from secateur.calibration.statistics import LayerSums, Statistics
from secateur.criteria import criteria
from secateur.criteria.base import GroupView
from secateur.criteria.curves import error_curve
from secateur.criteria.dgmr import gram_schmidt_order
from secateur.criteria.obs import greedy_removal
from secateur.linalg import damped_cholesky


class Mlp(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 10) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@pytest.fixture
def layer():
    """An MLP, its group, its hidden activations [T, N] and statistics made of them."""
    torch.manual_seed(0)
    model = Mlp().eval()
    x = torch.randn(200, 6)
    with torch.no_grad():
        h = model.act(model.fc1(x))
    anatomy = find_anatomy(model, x[:2])
    group = next(iter(anatomy.cuttable.values()))
    sums = sums_of(h)
    return model, group, h, Statistics(layers={"fc2": sums}, images=200)


def output_variance(h, weight_ND):
    y = h.double() @ weight_ND.double()
    return float((y - y.mean(0)).square().sum() / len(h))


def affine_error(h, weight_ND, kept):
    """Squared error per token of the best affine map from kept features to the dense output."""
    x = torch.cat([h[:, kept], torch.ones(len(h), 1)], 1).double()
    y = h.double() @ weight_ND.double()
    residual = y - x @ torch.linalg.lstsq(x, y).solution
    return float(residual.square().sum() / len(h))


def test_error_curve_is_the_error_of_the_best_affine_refit(layer):
    model, group, h, statistics = layer
    scores = torch.randn(10)
    curve = error_curve(GroupView(group, model, statistics), scores, damping=1e-12)
    order = scores.argsort(descending=True)
    for k in range(11):
        expected = affine_error(h, model.fc2.weight.T, order[:k].tolist()) / output_variance(h, model.fc2.weight.T)
        assert float(curve[k]) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_obs_first_removal_is_the_cheapest_of_all(layer):
    model, _group, h, statistics = layer
    covariance = statistics.layers["fc2"].covariance
    scores = greedy_removal(covariance, model.fc2.weight.T.double(), torch.arange(10), 10, damping=1e-12)
    costs = [affine_error(h, model.fc2.weight.T, [i for i in range(10) if i != j]) for j in range(10)]
    assert int(scores.argmin()) == costs.index(min(costs))


def test_obs_is_near_the_best_subset(layer):
    model, _group, h, statistics = layer
    covariance = statistics.layers["fc2"].covariance
    scores = greedy_removal(covariance, model.fc2.weight.T.double(), torch.arange(10), 10, damping=1e-12)
    errors = {s: affine_error(h, model.fc2.weight.T, list(s)) for s in itertools.combinations(range(10), 5)}
    mine = errors[tuple(sorted(scores.argsort(descending=True)[:5].tolist()))]
    ranks = sorted(errors.values())
    assert mine <= ranks[len(ranks) // 50]  # among the best 2 % of all 252 subsets


def test_obs_accumulated_error_is_the_curve(layer):
    """Greedy removal adds up to the error of the regression: downdates are exact."""
    model, group, h, statistics = layer
    view = GroupView(group, model, statistics)
    scores = greedy_removal(
        statistics.layers["fc2"].covariance, model.fc2.weight.T.double(), torch.arange(10), 10, damping=1e-10
    )
    curve = error_curve(view, scores, damping=1e-10) * output_variance(h, model.fc2.weight.T)
    removed_first = scores.argsort()
    for k in range(1, 10):
        assert float(curve[10 - k]) == pytest.approx(float(scores[removed_first[k - 1]]), rel=1e-2, abs=1e-6)


def test_obs_blocks_and_features_agree_when_units_are_single(layer):
    model, _group, _h, statistics = layer
    from secateur.criteria.obs import _remove_blocks, _remove_features

    inverse = torch.cholesky_inverse(damped_cholesky(statistics.layers["fc2"].covariance, 1e-8))
    weight, counts = model.fc2.weight.T.double().detach(), torch.ones(10, dtype=torch.long)
    gone_a, costs_a = _remove_features(inverse.clone(), weight.clone(), counts)
    gone_b, costs_b = _remove_blocks(inverse.clone(), weight.clone(), counts)
    assert gone_a.tolist() == gone_b.tolist()
    torch.testing.assert_close(costs_a, costs_b)


def test_obs_removes_a_duplicate_first(layer):
    """Two neurons that are copies: one costs nothing, and after it is gone the other does."""
    _model, _group, h, _ = layer
    h = torch.cat([h, h[:, :1]], 1).double()
    covariance = torch.cov(h.T, correction=0)
    weight = torch.randn(11, 6, dtype=torch.double)
    scores = greedy_removal(covariance, weight, torch.arange(11), 11, damping=1e-9)
    first = int(scores.argmin())
    assert first in (0, 10)
    other = 10 - first
    assert float(scores[other]) > 1e3 * float(scores[first])


def test_gram_schmidt_matches_the_naive_procedure():
    torch.manual_seed(1)
    rows = torch.randn(20, 7, dtype=torch.double)
    order = gram_schmidt_order(rows)
    assert sorted(order.tolist()) == list(range(20))
    left, naive = list(range(20)), []
    while left:
        work = rows[left].clone()
        names = list(left)
        for _ in range(min(7, len(names))):
            best = int(work.norm(dim=1).argmax())
            naive.append(names[best])
            direction = work[best] / work[best].norm()
            work = work - (work @ direction)[:, None] * direction
            work[best] = -0.0
            work[[names.index(n) for n in naive if n in names]] = 0
        left = [n for n in left if n not in naive]
    assert order.tolist() == naive


def test_taylor_squared_matches_gating_by_finite_differences():
    """Sum over tokens of h * dL/dh is the derivative with respect to a gate on the unit."""
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(6, 8)).double().eval()
    x = torch.randn(5, 4, 6, dtype=torch.double)
    gate = torch.ones(8, dtype=torch.double, requires_grad=True)
    handle = model[0].fc2.register_forward_pre_hook(lambda _m, args: (args[0] * gate,))

    def loss(out):
        return out.square().sum((1, 2))

    per_sample = torch.stack([torch.autograd.grad(loss(model(x))[i], gate)[0] for i in range(5)])
    handle.remove()
    h = []
    handle = model[0].fc2.register_forward_pre_hook(lambda _m, args: h.append(args[0]) or None)
    x.requires_grad_(True)
    out = loss(model(x)).sum()
    (gradient,) = torch.autograd.grad(out, h[0])
    handle.remove()
    torch.testing.assert_close((h[0] * gradient).sum(1), per_sample)


def test_leverage_of_orthogonal_units_is_equal_and_of_copies_is_shared():
    from secateur.criteria.leverage import leverage

    torch.manual_seed(0)
    model = Mlp(6, 4).eval()
    group = next(iter(find_anatomy(model, torch.randn(2, 6)).cuttable.values()))
    h = torch.eye(4)[:, [0, 1, 2, 2]]  # the last two are copies
    sums = LayerSums.zeros(4)
    for name, value in (("count", torch.tensor(4.0)), ("weight", torch.tensor(4.0)), ("outer", h.T @ h)):
        sums.add(name, value)
    scores = leverage(GroupView(group, model, Statistics(layers={"fc2": sums}), options={"ridge": 1e-6}))
    assert scores[0] == pytest.approx(1, abs=1e-4)
    assert scores[2] == pytest.approx(0.5, abs=1e-4)
    assert scores[3] == pytest.approx(0.5, abs=1e-4)


def test_variance_of_a_constant_unit_is_zero(layer):
    model, group, h, statistics = layer
    sums = statistics.layers["fc2"]
    sums.total[3], sums.square[3] = 200 * 5.0, 200 * 25.0
    scores = criteria.get("variance").score(GroupView(group, model, statistics))
    assert scores[3] == pytest.approx(0, abs=1e-3)
    assert int(scores.argmin()) == 3
    expected = h.var(0, correction=0) * model.fc2.weight.square().sum(0)
    keep = [i for i in range(10) if i != 3]
    torch.testing.assert_close(scores[keep], expected[keep].detach(), rtol=1e-3, atol=1e-6)


def test_wanda_and_magnitude_formulas(layer):
    model, group, h, statistics = layer
    view = GroupView(group, model, statistics)
    w1, w2 = model.fc1.weight.detach(), model.fc2.weight.detach()
    torch.testing.assert_close(
        criteria.get("wanda").score(view), h.square().mean(0).sqrt() * w2.abs().sum(0), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(criteria.get("magnitude").score(view), w1.norm(dim=1) * w2.norm(dim=0))


def test_unknown_criterion_names_the_closest():
    with pytest.raises(sc.SecateurError, match=r"unknown criterion 'obss'. Did you mean 'obs'\? Available: .*wanda"):
        criteria.get("obss")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: sc.score(s, "obs", dampening=1e-3), "criterion 'obs' has no option 'dampening'; it has damping"),
        (lambda s: sc.score(s, "amp", x=1), "criterion 'amp' has no option 'x'; it has none"),
        (lambda s: sc.allocate(sc.score(s, "obs"), 0.8, "curve", pwr=2), "'curve' has no option 'pwr'; it has power"),
    ],
)
def test_an_unknown_option_is_refused(vit, photos, make, message):
    calibrated = sc.calibrate(vit, photos, loss=("features", "entropy"))
    with pytest.raises(sc.SecateurError, match=message):
        make(calibrated)


@pytest.mark.parametrize(("kind", "key"), [("Statistics", "secateur_statistics"), ("Scores", "secateur_scores")])
@pytest.mark.parametrize("header", ["[]", "{}", '{"version": 99}', "3", "not json"])
@pytest.mark.parametrize("tensor", ["layer|x", "layer|x|nonsense", "value", "other|x|y"])
def test_a_file_that_lies_is_one_clear_error(tmp_path, kind, key, header, tensor):
    from safetensors.torch import save_file

    save_file({tensor: torch.zeros(1)}, tmp_path / "file.safetensors", metadata={key: header})
    with pytest.raises(sc.SecateurError, match=r"file\.safetensors' is not a readable"):
        getattr(sc, kind).load(tmp_path / "file.safetensors")
