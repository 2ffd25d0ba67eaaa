"""Calibration gives the sums it promises, in one pass, whatever the batch size, rank count or checkpointing."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.calibration.losses import LossInput, losses
from secateur.models import Features, features


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = sc.load_model("timm/test_vit", pretrained=False, img_size=32, num_classes=5)
    return model, sc.inspect(model), torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def captured(model, path, images):
    """Input and output of a layer, with a graph, and the features."""
    seen = {}
    handle = model.get_submodule(path).register_forward_hook(lambda _m, a, o: seen.update(h=a[0], y=o))
    out = features(model, images.requires_grad_(True))
    handle.remove()
    return seen["h"], seen["y"], out


def same(a, b, **tolerance):
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(tensor, b.tensors()[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_moments_match_direct_computation(vit):
    model, anatomy, images = vit
    statistics = sc.calibrate(model, images, anatomy, loss=(), batch_size=5)
    h, _, _ = captured(model, "blocks.2.mlp.fc2", images.clone())
    flat = h.detach().flatten(0, 1)
    sums = statistics.layers["blocks.2.mlp.fc2"]
    assert float(sums.count) == len(flat)
    torch.testing.assert_close(sums.mean, flat.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sums.variance, flat.var(0, correction=0), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(sums.covariance, torch.cov(flat.T.double(), correction=0), rtol=1e-3, atol=1e-6)
    assert statistics.images == 12


@pytest.mark.parametrize("loss", ["features", "entropy", "logits-entropy"])
def test_taylor_sums_match_direct_computation(vit, loss):
    model, anatomy, images = vit
    statistics = sc.calibrate(model, images, anatomy, loss=loss, batch_size=12)
    for path, group in (("blocks.1.mlp.fc2", "blocks.1.mlp:hidden"), ("blocks.3.attn.proj", "blocks.3.attn:heads")):
        h, _, out = captured(model, path, images.clone())
        (g,) = torch.autograd.grad(losses.get(loss)(LossInput(out, seed=0)), h)
        product = (h * g).detach()
        size = anatomy.groups[group].size
        product = product.unflatten(-1, (size, -1)).sum(-1)
        sums = statistics.taylor[loss][f"{group}@{path}"]
        torch.testing.assert_close(sums.sample, product.sum(1).abs().sum(0), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(sums.squared, product.sum(1).square().sum(0), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(sums.token, product.abs().sum((0, 1)), rtol=1e-3, atol=1e-7)


def test_energy_and_weighted_moments(vit):
    model, anatomy, images = vit
    statistics = sc.calibrate(model, images, anatomy, batch_size=12, power=1.0)
    path = "blocks.4.mlp.fc2"
    h, y, out = captured(model, path, images.clone())
    (g,) = torch.autograd.grad(losses.get("features")(LossInput(out, seed=0)), y)
    sums = statistics.layers[path]
    energy = g.square().sum((0, 2))
    torch.testing.assert_close(sums.energy, energy, rtol=1e-3, atol=1e-9)
    weights = energy.clamp_min(1e-3 * energy.mean())
    weights = weights / weights.mean()
    expected = torch.einsum("p,bpm,bpn->mn", weights, h, h).detach()
    torch.testing.assert_close(sums.outer, expected, rtol=1e-3, atol=1e-5)


def test_share_of_the_stream(vit):
    model, anatomy, images = vit
    statistics = sc.calibrate(model, images, anatomy, loss=(), batch_size=12)
    seen = {}
    block = model.blocks[2]
    handles = [
        block.mlp.fc2.register_forward_hook(lambda _m, _a, y: seen.update(mlp=y)),
        block.attn.proj.register_forward_hook(lambda _m, _a, y: seen.update(attn=y)),
        block.norm2.register_forward_pre_hook(lambda _m, a: seen.update(middle=a[0])),
        block.register_forward_hook(lambda _m, _a, y: seen.update(end=y)),
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for path, written, stream in (("mlp.fc2", "mlp", "end"), ("attn.proj", "attn", "middle")):
        b = seen[written] - seen[written].mean((0, 1))
        s = seen[stream] - seen[stream].mean(-1, keepdim=True)
        expected = (b.square().sum(-1) / s.square().sum(-1)).mean()
        assert statistics.layers[f"blocks.2.{path}"].stream_share == pytest.approx(float(expected), rel=1e-3)


def test_model_is_left_as_it_was(vit):
    model, anatomy, images = vit
    model.train()
    grads = [p.requires_grad for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sc.calibrate(model, images, anatomy, loss=("features", "entropy", "kl"), checkpointing=True)
    assert all(m.training for m in model.modules())
    assert grads == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    model.eval()


def test_checkpointing_changes_nothing(vit):
    model, anatomy, images = vit
    options = {"loss": ("features", "entropy"), "batch_size": 6}
    plain = sc.calibrate(model, images, anatomy, **options)
    again = sc.calibrate(model, images, anatomy, checkpointing=True, **options)
    same(plain, again, rtol=1e-4, atol=1e-6)


def test_several_losses_in_one_pass_equal_one_at_a_time(vit):
    model, anatomy, images = vit
    together = sc.calibrate(model, images, anatomy, loss=("features", "entropy", "kl"), batch_size=6)
    for loss in ("features", "entropy", "kl"):
        alone = sc.calibrate(model, images, anatomy, loss=loss, batch_size=6)
        for key, sums in alone.taylor[loss].items():
            for name, value in vars(sums).items():
                torch.testing.assert_close(value, getattr(together.taylor[loss][key], name), rtol=1e-3, atol=1e-8)


def test_bfloat16_is_close(vit):
    model, anatomy, images = vit
    a = sc.calibrate(model, images, anatomy)
    b = sc.calibrate(model, images, anatomy, dtype="bfloat16")
    for path, sums in a.layers.items():
        assert b.layers[path].outer.dtype == torch.float32
        assert F.cosine_similarity(sums.outer.flatten(), b.layers[path].outer.flatten(), dim=0) > 0.999


def test_save_and_load(vit, tmp_path):
    model, anatomy, images = vit
    statistics = sc.calibrate(model, images, anatomy, loss=("features", "entropy"))
    statistics.save(tmp_path / "s.safetensors")
    again = sc.Statistics.load(tmp_path / "s.safetensors")
    same(statistics, again, rtol=0, atol=0)
    assert again.meta == statistics.meta
    assert again.images == statistics.images
    a, b = sc.score(statistics, "obs"), sc.score(again, "obs", model=model, anatomy=anatomy)
    assert all(torch.equal(a.values[n], b.values[n]) for n in a.values)


def test_statistics_of_another_model_are_refused(vit):
    model, anatomy, images = vit
    statistics = sc.calibrate(model, images, anatomy, loss=())
    other = sc.load_model("timm/test_vit2", pretrained=False, img_size=32, num_classes=5)
    with pytest.raises(sc.SecateurError, match="belong to another model"):
        sc.score(statistics, "variance", model=other, anatomy=sc.inspect(other))


def test_missing_gradients_are_named(vit):
    model, anatomy, images = vit
    statistics = sc.calibrate(model, images, anatomy, loss="features")
    with pytest.raises(sc.SecateurError, match=r"no gradients of loss 'entropy' \(they hold: features\)"):
        sc.score(statistics, "amp")


def test_in_batch_loss_refuses_single_images(vit):
    model, anatomy, images = vit
    with pytest.raises(sc.SecateurError, match="compares images within a batch"):
        sc.calibrate(model, images, anatomy, loss="entropy", batch_size=1)
    with pytest.raises(sc.SecateurError, match="compares images within a batch"):
        sc.calibrate(model, images[:1], anatomy, loss="entropy")
    odd = sc.calibrate(model, images[:5], anatomy, loss="entropy", batch_size=4)  # a last batch of one is left out
    assert all(torch.isfinite(t.sample).all() for t in odd.taylor["entropy"].values())


def test_nan_weights_are_an_error(vit):
    _model, anatomy, images = vit
    broken = sc.load_model("timm/test_vit", pretrained=False, img_size=32, num_classes=5)
    broken.blocks[0].mlp.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(sc.SecateurError, match="not finite"):
        sc.calibrate(broken, images, anatomy)


def test_cross_entropy_needs_labels_and_uses_them(vit, tmp_path):
    model, anatomy, images = vit
    with pytest.raises(sc.SecateurError, match="needs labels"):
        sc.calibrate(model, images, anatomy, loss="cross-entropy")
    labels = torch.arange(12) % 5
    statistics = sc.calibrate(model, [(images, labels)], anatomy, loss="cross-entropy", batch_size=12)
    h, _, out = captured(model, "blocks.0.mlp.fc2", images.clone())
    (g,) = torch.autograd.grad(F.cross_entropy(out.logits, labels, reduction="sum"), h)
    sums = statistics.taylor["cross-entropy"]["blocks.0.mlp:hidden@blocks.0.mlp.fc2"]
    torch.testing.assert_close(sums.sample, (h * g).sum(1).abs().sum(0).detach(), rtol=1e-3, atol=1e-7)
    with pytest.raises(sc.SecateurError, match="label 9 does not exist"):
        sc.calibrate(model, [(images, labels + 5)], anatomy, loss="cross-entropy")


def test_random_projection_is_the_fisher_information():
    """Averaged over draws, the squared gradient is J^T J."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3)
    x = torch.randn(1, 3, requires_grad=True)

    def embed(v):
        return F.normalize(v @ weight.T, dim=-1)

    jacobian = torch.autograd.functional.jacobian(embed, x.detach())[0, :, 0]  # [4, 3]
    total, draws = torch.zeros(3, 3), 3000
    for seed in range(draws):
        loss = losses.get("features")(LossInput(Features(x @ weight.T), seed=seed))
        (g,) = torch.autograd.grad(loss, x)
        total += g.T @ g / draws
    torch.testing.assert_close(total, jacobian.T @ jacobian, rtol=0.1, atol=0.02)


def test_kl_is_flat_at_the_uncut_model_and_not_after_a_sliver(vit):
    model, anatomy, images = vit
    statistics = sc.calibrate(model, images, anatomy, loss="kl", batch_size=12)
    assert all(float(t.sample.sum()) > 0 for t in statistics.taylor["kl"].values())
    h, _, out = captured(model, "blocks.0.mlp.fc2", images.clone())
    teacher = Features(out.embedding.detach(), logits=out.logits.detach())
    (g,) = torch.autograd.grad(losses.get("kl")(LossInput(out, teacher=teacher)), h)
    assert float(g.abs().max()) < 1e-6


_TWO_RANKS = """
import sys, torch
import secateur as sc
from secateur.calibration.distributed import rank_and_world
torch.manual_seed(0); torch.set_num_threads(1)
model = sc.load_model("timm/test_vit", pretrained=False, img_size=32, num_classes=5)
images = torch.randn(14, 3, 32, 32, generator=torch.Generator().manual_seed(1))
s = sc.calibrate(model, images, loss=("features", "entropy", "kl"), batch_size=4)
if rank_and_world()[0] == 0:
    s.save(sys.argv[1])
"""


def test_two_ranks_give_the_sums_of_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(_TWO_RANKS))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, str(script), str(tmp_path / "one.safetensors")]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
           str(tmp_path / "two.safetensors")]  # fmt: skip
    for command in (one, two):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    a, b = (sc.Statistics.load(tmp_path / f"{n}.safetensors") for n in ("one", "two"))
    assert a.images == b.images == 14
    same(a, b, rtol=1e-4, atol=1e-6)
