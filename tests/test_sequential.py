"""Sequential refitting: exact where that is possible, better than the affine fold elsewhere, identity at no cut."""

import pytest
import torch

import secateur as sc
from secateur.plan import Kept, Plan
from secateur.replay import Prefix, Spool
from secateur.surgery.sequential import RIDGES, Moments


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    shape = {"img_size": 64, "embed_dim": 24, "num_heads": 4, "depth": 3, "num_classes": 0, "init_values": 0.1}
    model = sc.load_model("timm/vit_tiny_patch16_224", pretrained=False, **shape)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, p[0].numel() ** -0.5)
    anatomy = sc.inspect(model)
    images = torch.randn(48, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    statistics = sc.calibrate(model, images, anatomy)
    return model, anatomy, images, statistics


def every(anatomy, step, kinds=("hidden", "heads")):
    """A plan that keeps every `step`-th unit."""
    groups = {n: g for n, g in anatomy.cuttable.items() if str(g.kind) in kinds}
    kept = {n: Kept(kind=str(g.kind), size=g.size, keep=tuple(range(0, g.size, step))) for n, g in groups.items()}
    return Plan(groups=kept)


def halves(anatomy, kinds=("hidden",)):
    return every(anatomy, 2, kinds)


def error(model, dense, images):
    with torch.no_grad():
        return float((dense.forward_features(images) - model.forward_features(images)).square().mean())


def test_empty_plan_is_the_identity(vit):
    model, anatomy, images, statistics = vit
    plan = every(anatomy, 1)
    small = sc.prune(model, plan, compensate="sequential", stats=statistics, data=images)
    with torch.no_grad():
        assert torch.equal(small(images[:4]), model(images[:4]))


@pytest.mark.parametrize("kinds", [("hidden",), ("heads",), ("hidden", "heads")])
def test_better_than_affine_on_other_images(vit, kinds):
    model, anatomy, images, statistics = vit
    plan = halves(anatomy, kinds)
    other = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    errors = {
        how: error(sc.prune(model, plan, compensate=how, stats=statistics, data=images), model, other)
        for how in ("none", "affine", "sequential")
    }
    assert errors["sequential"] < errors["affine"] < errors["none"]


def test_copies_are_recovered_exactly(vit):
    """Every second neuron is a copy of the one before it: cutting the copies must cost nothing."""
    import copy

    model, _, images, _ = vit
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight[1::2] = block.mlp.fc1.weight[::2]
            block.mlp.fc1.bias[1::2] = block.mlp.fc1.bias[::2]
    anatomy = sc.inspect(model)
    statistics = sc.calibrate(model, images, anatomy)
    small = sc.prune(model, halves(anatomy), compensate="sequential", stats=statistics, data=images, ridge=1e-7)
    with torch.no_grad():
        a, b = model(images[:8]), small(images[:8])
    assert float((a - b).abs().max()) < 2e-3 * float(a.abs().max())


@pytest.mark.parametrize(("noise", "images"), [(0.0, 40), (30.0, 12), (0.3, 31)])
def test_the_ridge_is_the_best_of_two_fold_cross_validation(noise, images):
    rng = torch.Generator().manual_seed(0)
    h, w = torch.randn(images, 5, 6, generator=rng), torch.randn(6, 3, generator=rng)
    y = h @ w + 1.0 + noise * torch.randn(images, 5, 3, generator=rng)
    weights = torch.rand(5, generator=rng)
    moments = Moments(6, 3)
    for a, b in ((0, 7), (7, images)):
        moments.add(h[a:b], y[a:b], weights)

    def fit(x, t, w, ridge):
        x1 = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
        moment = x1.T @ (w[:, None] * x1)
        penalty = ridge * moment.diagonal()[:-1].mean() * torch.ones(7)
        penalty[-1] = 1e-6 * moment[-1, -1]
        return torch.linalg.solve(moment + penalty.diag(), x1.T @ (w[:, None] * t.double()))

    def rows(part):
        return h[part].flatten(0, 1), y[part].flatten(0, 1), weights.repeat(len(h[part])).double()

    def error(ridge):
        total = 0.0
        for mine, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            step = fit(*rows(mine), ridge)
            x, t, w = rows(other)
            total += float((w[:, None] * (x @ step[:-1].float() + step[-1].float() - t) ** 2).sum())
        return total

    best = fit(*rows(slice(None)), min(RIDGES, key=error))
    step, shift = moments.solve(constant=True)
    assert torch.allclose(torch.cat([step, shift[None]]), best, rtol=1e-4, atol=1e-4)


def test_needs_images(vit):
    model, anatomy, _images, statistics = vit
    with pytest.raises(sc.SecateurError, match="reads the calibration images again: give data="):
        sc.prune(model, halves(anatomy), compensate="sequential", stats=statistics)


def test_leaves_nothing_behind(vit):
    model, anatomy, images, statistics = vit
    small = sc.prune(model, halves(anatomy), compensate="sequential", stats=statistics, data=images[:16])
    for m in (*model.modules(), *small.modules()):
        assert not m._forward_hooks
        assert not m._forward_pre_hooks
        assert "forward" not in vars(m)


def test_a_model_without_blocks_is_refit_too():
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8)
    ).eval()
    images = torch.randn(200, 3, 4, 4)
    anatomy = sc.inspect(model, images[:2])
    statistics = sc.calibrate(model, images, anatomy)
    other = torch.randn(64, 3, 4, 4)
    errors = {}
    for how in ("affine", "sequential"):
        small = sc.prune(model, halves(anatomy), compensate=how, stats=statistics, data=images)
        with torch.no_grad():
            errors[how] = float((small(other) - model(other)).square().mean())
    assert errors["sequential"] < errors["affine"]


def test_prefix_gives_the_full_result_and_notices_when_it_cannot(vit):
    model, anatomy, images, _ = vit
    prefix = Prefix(model, anatomy.blocks, lambda m, x: m(x))
    assert prefix.check(images[:2])
    outs = []
    handle = model.blocks[1].register_forward_hook(lambda _m, _a, out: outs.append(out))
    with torch.no_grad():
        full = model(images[:2])
    handle.remove()
    ran = []
    handle = model.blocks[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad(), prefix.resumed(2, outs[0]):
        again = model(images[:2])
    handle.remove()
    assert torch.equal(full, again)
    assert not ran

    class Reads(torch.nn.Module):
        """Reads an early block again at the end: skipping is not sound."""

        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(4))

        def forward(self, x):
            first = x = self.blocks[0](x)
            for block in self.blocks[1:]:
                x = block(x)
            return x + 2 * first

    reads = Reads()
    prefix = Prefix(reads, tuple(f"blocks.{i}" for i in range(4)), lambda m, x: m(x))
    assert not prefix.check(torch.randn(2, 4))


def test_spool_keeps_trees_and_old_readers(tmp_path):
    spool = Spool()
    first = {"a": torch.ones(3), "b": (torch.zeros(2, dtype=torch.bfloat16), 5, None)}
    spool.put("k", first)
    held = spool.get("k")
    spool.put("k", {"a": torch.full((3,), 2.0), "b": (torch.zeros(2, dtype=torch.bfloat16), 6, None)})
    assert torch.equal(held["a"], torch.ones(3))
    assert spool.get("k")["b"][1] == 6
    assert spool.get("k")["b"][0].dtype == torch.bfloat16
    spool.drop("k")
    assert "k" not in spool
