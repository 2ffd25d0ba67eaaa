"""Every registered criterion, allocator and compensator meets every kind of model."""

import functools

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocation import allocators
from secateur.calibration import losses
from secateur.criteria import criteria
from secateur.surgery import compensators


class ConvNet(nn.Module):
    """Batch norm, a depthwise convolution, and a chain of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.expand, self.bn1 = nn.Conv2d(16, 48, 1), nn.BatchNorm2d(48)
        self.depthwise, self.bn2 = nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.BatchNorm2d(48)
        self.project, self.head = nn.Conv2d(48, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.bn1(self.expand(x)).relu()
        x = x + self.project(self.bn2(self.depthwise(y)).relu())
        return self.head(x.mean((2, 3)))


def timm_model(name, **options):
    return sc.load_model(f"timm/{name}", pretrained=False, num_classes=5, **options)


def dinov2():
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    )


def open_clip():
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))
    from secateur.models import Source, attach
    from secateur.models.source import ImageSpec

    return attach(model.eval(), Source("open_clip", "tiny", {}, ImageSpec((32, 32))))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, max_position_embeddings=32)).eval()


MODELS = {
    "vit": lambda: timm_model("test_vit", img_size=32),
    "packed glu": lambda: timm_model("eva02_tiny_patch14_224", img_size=28, depth=2, embed_dim=48, num_heads=4),
    "split glu with norm": lambda: timm_model(
        "eva02_base_patch14_224", img_size=28, depth=2, embed_dim=48, num_heads=4
    ),
    "swin": lambda: timm_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, depths=(1, 2), num_heads=(2, 4)
    ),
    "convnext": lambda: timm_model("test_convnext"),
    "transformers": dinov2,
    "open_clip": open_clip,
    "convolutions": lambda: ConvNet().eval(),
    "language model": llama,
}


@functools.cache
def prepared(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, p[0].numel() ** -0.5)
    generator = torch.Generator().manual_seed(1)
    size = sc.source_of(model).image.size if kind not in ("convnext", "convolutions") else (32, 32)
    images = torch.randn(8, 3, *size, generator=generator)
    if kind == "language model":
        images = torch.randint(0, 96, (8, 16), generator=generator)
    anatomy = sc.inspect(model, images[:2])
    with torch.no_grad():
        classifies = sc.models.features(model, images).logits is not None
    names = ["features", "entropy", "kl", *(["logits-entropy", "cross-entropy"] if classifies else [])]
    data = images if kind == "language model" else [(images, torch.arange(8) % 5)]
    weighed = [n for n in names if n in ("kl", "cross-entropy")]
    options = {"loss": names, "weights": weighed, "projected": True, "batch_size": 8}
    return model, anatomy, images, sc.calibrate(model, data, anatomy, **options)


def finite(model, images):
    with torch.no_grad():
        out = sc.models.features(model, images).embedding
    assert torch.isfinite(out).all()
    return out


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("criterion", criteria)
def test_every_criterion_scores_every_model(kind, criterion):
    _model, anatomy, _images, statistics = prepared(kind)
    if criteria.get(criterion).blocks and anatomy.removable and float(statistics.stream.count) == 0:
        with pytest.raises(sc.SecateurError, match=r"the stream changes on its way|nothing about the blocks"):
            sc.score(statistics, criterion)
        return
    if missing := set(criteria.get(criterion).losses) - set(statistics.losses):
        with pytest.raises(sc.SecateurError, match=f"'{missing.pop()}'"):
            sc.score(statistics, criterion)
        return
    scores = sc.score(statistics, criterion)
    observed = {n for n, g in anatomy.cuttable.items() if g.consumers}
    observed = set(anatomy.removable) if criteria.get(criterion).blocks else observed
    assert observed <= set(scores.values)
    for name, values in scores.values.items():
        assert values.shape == (anatomy.groups[name].size,)
        assert torch.isfinite(values).all()
        assert values.unique().numel() > 1 or anatomy.groups[name].size == 1
        assert criteria.get(criterion).blocks == (anatomy.groups[name].kind == "blocks")
    for name, curve in scores.curves.items():
        assert curve.shape == (anatomy.groups[name].size + 1,)
        assert (curve.diff() <= 1e-9 + 1e-6 * curve[0]).all()  # more units, less error


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("allocator", allocators)
def test_every_allocator_plans_for_every_model(kind, allocator):
    model, anatomy, images, statistics = prepared(kind)
    if allocator == "contiguous":
        with pytest.raises(sc.SecateurError, match="was not scored as such"):
            sc.allocate(sc.score(statistics, "variance"), 0.8, allocator)
        return
    scores = sc.score(statistics, "variance")
    data = sc.batches(images, sc.source_of(model).input, size=8)
    if allocator in ("cfsp", "modegpt") and not scores.blocks.numel():
        with pytest.raises(sc.SecateurError, match="how much every block turns the stream"):
            sc.allocate(scores, 0.8, allocator)
        return
    plan = sc.allocate(scores, 0.8, allocator, align=4, model=model, data=data, **(
        {"rounds": 2, "steps": 2} if allocator == "amp-bisect" else {}))  # fmt: skip
    small = sc.prune(model, plan, compensate="none", anatomy=anatomy)
    assert sc.parameters(small) == plan.predicted["params"] <= 0.8 * sc.parameters(model)
    masked = finite(sc.mask(model, plan, anatomy), images)
    torch.testing.assert_close(finite(small, images), masked, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("compensator", compensators)
def test_every_compensator_refits_every_model(kind, compensator):
    model, _anatomy, images, statistics = prepared(kind)
    plan = sc.allocate(sc.score(statistics, "obs"), 0.8, "uniform", align=4)
    small = sc.prune(model, plan, compensate=compensator, stats=statistics, data=images)
    finite(small, images)
    assert sc.parameters(small) >= plan.predicted["params"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("loss", losses)
def test_every_loss_serves_every_model_or_says_why_not(kind, loss):
    model, anatomy, images, _ = prepared(kind)
    labelled = images if kind == "language model" else [(images, torch.arange(8) % 5)]
    try:
        statistics = sc.calibrate(model, labelled, anatomy, loss=loss, covariance=False, batch_size=8)
    except sc.SecateurError as error:
        assert "classifier" in str(error)
        return
    assert all(float(t.token.sum()) > 0 for t in statistics.taylor[loss].values())
