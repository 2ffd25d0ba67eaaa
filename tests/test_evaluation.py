"""Evaluators and measurers against formulas and brute force."""

import pytest
import torch

import secateur as sc
from secateur.evaluation.fidelity import neighbour_agreement, self_retrieval
from secateur.evaluation.knn import knn_top1


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return sc.load_model("timm/test_vit", pretrained=False, img_size=32, num_classes=7)


def test_a_model_is_faithful_to_itself(vit):
    images = torch.randn(10, 3, 32, 32)
    found = sc.fidelity(vit, vit, sc.batches(images, sc.source_of(vit).image, size=4))
    assert found.cls_cosine == pytest.approx(1, abs=1e-5)
    assert found.patch_cosine == pytest.approx(1, abs=1e-5)
    assert found.self_retrieval == found.neighbours == found.top1_agreement == 1
    assert found.images == 10


def test_another_model_is_not(vit):
    torch.manual_seed(1)
    other = sc.load_model("timm/test_vit", pretrained=False, img_size=32, num_classes=7)
    found = sc.fidelity(other, vit, sc.batches(torch.randn(10, 3, 32, 32), sc.source_of(vit).image))
    assert found.cls_cosine < 0.9


def test_retrieval_and_neighbours_by_brute_force():
    torch.manual_seed(0)
    a, b = torch.randn(9, 4), torch.randn(9, 4)

    def cosine(x, y):
        return float(x @ y / x.norm() / y.norm())

    own = sum(max(range(9), key=lambda j: cosine(a[i], b[j])) == i for i in range(9)) / 9
    near = [[max((j for j in range(9) if j != i), key=lambda j: cosine(x[i], x[j])) for i in range(9)] for x in (a, b)]
    assert self_retrieval(a, b) == pytest.approx(own)
    assert neighbour_agreement(a, b) == pytest.approx(sum(p == q for p, q in zip(*near, strict=True)) / 9)


def test_knn_by_brute_force():
    torch.manual_seed(0)
    train = torch.nn.functional.normalize(torch.randn(40, 5), dim=1), torch.randint(0, 4, (40,))
    test = torch.nn.functional.normalize(torch.randn(15, 5), dim=1), torch.randint(0, 4, (15,))
    right = 0
    for x, label in zip(*test, strict=True):
        similarity = train[0] @ x
        votes = [0.0] * 4
        for j in similarity.argsort(descending=True)[:6]:
            votes[int(train[1][j])] += float((similarity[j] / 0.07).exp())
        right += votes.index(max(votes)) == int(label)
    assert knn_top1(train, test, k=6) == pytest.approx(right / 15)


def test_one_image_is_too_few(vit):
    with pytest.raises(sc.SecateurError, match="at least 2 readable images"):
        sc.fidelity(vit, vit, sc.batches(torch.randn(1, 3, 32, 32), sc.source_of(vit).image))


def test_features_that_cannot_be_compared(vit):
    images = sc.batches(torch.randn(4, 3, 32, 32), sc.source_of(vit).image)
    wide, sound = (sc.load_model("timm/test_vit", pretrained=False, img_size=32, embed_dim=128) for _ in range(2))
    with pytest.raises(sc.SecateurError, match=r"differ in length \(128 and 64\); compare a cut model"):
        sc.fidelity(wide, vit, images)
    with torch.no_grad():
        wide.norm.weight[3] = float("nan")
    with pytest.raises(sc.SecateurError, match="the dense model's features are not finite"):
        sc.fidelity(sound, wide, images)


def test_macs_of_a_vit_match_the_formula(vit):
    tokens, width, hidden, depth, heads_width = 5, 64, 192, 6, 64
    block = tokens * (width * 3 * heads_width + heads_width * width + 2 * width * hidden) + 2 * tokens**2 * heads_width
    patches = 4 * 3 * 16 * 16 * width
    assert sc.macs(vit) == depth * block + patches + width * 7


def test_macs_fall_as_the_anatomy_predicts(vit):
    anatomy = sc.inspect(vit)
    images = torch.randn(8, 3, 32, 32)
    plan = sc.allocate(sc.score(None, "magnitude", model=vit, anatomy=anatomy), 0.6, "uniform")
    small = sc.prune(vit, plan, compensate="none", anatomy=anatomy)
    assert sc.parameters(small) == plan.predicted["params"]
    assert sc.macs(small, images[:1]) == pytest.approx(plan.predicted["macs"])


def test_latency_reports_every_model(vit):
    times = sc.latency({"a": vit, "b": vit}, batch_size=2, rounds=5, warm_up=1)
    assert set(times) == {"a", "b"}
    for t in times.values():
        assert 0 < t.low_ms <= t.median_ms <= t.high_ms
        assert t.images_per_second == pytest.approx(2000 / t.median_ms)
