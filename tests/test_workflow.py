"""compress: what it reports is what was made, budgets are kept, and an interrupted run ends in the same bytes."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from conftest import write_pictures
from secateur import workflow
from secateur.errors import ArtifactError, BudgetError, DataError, RegistryError, SecateurError, SecateurWarning
from secateur.files import atomic_file
from secateur.models import ImageSpec, example_input, features

QUICK = {"keep_params": 0.75, "measure": False, "batch_size": 8}


def compress(model, images, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        return sc.compress(model, images, **{**QUICK, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def files_of(data) -> set[str]:
    return {Path(item).name for item in data.items}


@pytest.fixture(scope="module")
def whole(shallow, photos, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "small"
    return compress(shallow, photos, out=out), contents(out)


# What comes back


def test_the_result_says_what_was_made(shallow, photos, tmp_path):
    dense, out = sc.load_model(shallow), tmp_path / "small"
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    result = sc.compress(dense, photos, out=out, keep_params=0.75, held_out=6)
    small = result.model
    rows = {name: row for name, *row in result.table}
    assert list(rows) == ["parameters", "MACs per image", "latency, batch 8 (ms)", "images per second"]
    for name, measured in (("parameters", sc.parameters), ("MACs per image", sc.macs)):
        assert rows[name] == [measured(dense), measured(small), measured(small) / measured(dense)]
    assert rows["parameters"][2] <= 0.75
    assert rows["images per second"][1] == pytest.approx(8000 / rows["latency, batch 8 (ms)"][1])
    assert rows["latency, batch 8 (ms)"][0] == result.timings["dense"].median_ms
    assert result.held_out
    assert result.fidelity.images == 4  # a fifth of 24
    assert result.fidelity.cls_cosine < 1
    assert result.plan.budget == {"params": 0.75}
    assert result.plan.predicted["params"] == sc.parameters(small)
    assert (result.skipped, result.reused) == ({}, [])
    assert result.settings.keep_params == 0.75
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())
    assert json.loads((out / "secateur.json").read_text())["figures"] == json.loads(json.dumps(result.figures()))
    assert sc.Plan.load(out / "plan.json") == result.plan
    again, images = sc.load(out), example_input(dense)
    with torch.no_grad():
        assert torch.equal(features(again, images).embedding, features(small, images).embedding)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_the_same_again_gives_the_same_bytes(shallow, photos, whole, tmp_path):
    compress(shallow, photos, out=tmp_path / "small")
    assert contents(tmp_path / "small") == whole[1]


def test_without_timing_there_is_none(whole):
    result, _ = whole
    assert result.timings == {}
    assert [row[0] for row in result.table] == ["parameters", "MACs per image"]


# Budgets


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_macs_are_kept_to(shallow, photos, share):
    result = compress(shallow, photos, keep_params=None, keep_macs=share)
    ratio = sc.macs(result.model) / sc.macs(sc.load_model(shallow))
    assert share - 0.06 < ratio <= share


def test_quality_is_kept_to_and_more_of_it_costs_more(shallow, photos):
    sizes = {}
    for quality in (0.98, 0.8):
        result = compress(shallow, photos, keep_params=None, min_quality=quality, compensator="none")
        assert result.fidelity.cls_cosine >= quality
        sizes[quality] = sc.parameters(result.model)
    assert sizes[0.8] < sizes[0.98] < sc.parameters(sc.load_model(shallow))


def test_a_quality_that_no_cut_has_leaves_the_model_whole(shallow, photos):
    with pytest.warns(SecateurWarning, match="nothing was cut: the budget leaves the whole model as it is"):
        result = sc.compress(shallow, photos, min_quality=1.0, measure=False, align=96)
    dense = sc.load_model(shallow)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), result.model.parameters(), strict=True))


def test_only_the_kinds_asked_for(shallow, photos):
    result = compress(shallow, photos, keep_params=0.85, kinds=("hidden",))
    assert {group.kind for group in result.plan.groups.values()} == {"hidden"}


def test_uniform_width_and_align(shallow, photos):
    kept = compress(shallow, photos, keep_params=0.7, uniform_width=True, align=32).plan.kept()
    widths = {n for name, n in kept.items() if name.endswith("hidden")}
    assert len(widths) == 1
    assert widths.pop() % 32 == 0


def untouched(*_, **__):
    pytest.fail("a long step was begun")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep_params": None}, BudgetError, "give exactly one of keep_params, keep_macs and min_quality"),
        ({"keep_macs": 0.5}, BudgetError, "give exactly one"),
        ({"keep_params": 0}, BudgetError, "above 0 and at most 1"),
        ({"keep_params": 1.5}, BudgetError, "above 0 and at most 1"),
        ({"keep_params": 75}, BudgetError, "for 75 percent give 0.75"),
        ({"keep_params": 0.05}, BudgetError, r"cannot be reached: with a floor of 10% in every group .* remain"),
        ({"floor": 0.9}, BudgetError, "raise the budget, or lower floor or align"),
        ({"floor": 1.0}, BudgetError, "floor is a share below 1"),
        ({"kinds": ("neurons",)}, BudgetError, "no group of kind 'neurons' can be cut; this model has heads, hidden"),
        ({"criterion": "obss"}, RegistryError, "unknown criterion 'obss'. Did you mean 'obs'?"),
        ({"allocator": "curv"}, RegistryError, "unknown allocator 'curv'. Did you mean 'curve'?"),
        ({"compensator": "afine"}, RegistryError, "unknown compensator 'afine'. Did you mean 'affine'?"),
        ({"dtype": "float16"}, DataError, "dtype 'float16' is not known; use float32 or bfloat16"),
        ({"batch_size": 1}, DataError, "give at least 2 images and batch_size 2"),
        ({"batch_size": 0}, DataError, "a batch holds at least one image"),
        ({"limit": 1}, DataError, "limit is a number of images, at least 2, found 1"),
        ({"held_out": 0}, DataError, "held_out is a number of images, at least 2, found 0"),
        ({"keep_parms": 0.5}, SecateurError, "unknown setting .*'keep_parms'.*see help"),
        ({"resume": True}, SecateurError, "resume needs out="),
    ],
)
def test_bad_settings_are_refused_before_the_long_steps(shallow, photos, monkeypatch, settings, error, message):
    monkeypatch.setattr("secateur.calibration._one_batch", untouched)
    with pytest.raises(error, match=message) as caught:
        compress(shallow, photos, criterion=settings.pop("criterion", "amp"), **settings)
    assert "\n" not in str(caught.value)


def test_a_cut_model_is_not_cut_again(whole, photos):
    with pytest.raises(SecateurError, match="was cut before; compress the dense one"):
        compress(whole[0].model, photos)


def test_a_model_with_nothing_to_cut(photos):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(SecateurError, match="no group that can be cut; `secateur inspect` says why"):
        compress(model, photos, model_options={"image": ImageSpec(size=(8, 8))})


# Images


def test_held_out_images_are_never_used_before_the_comparison(shallow, photos, monkeypatch):
    used, compared = set(), set()
    for name, into, place in (("calibrate", used, 1), ("fidelity", compared, 2)):
        original = getattr(workflow, name)

        def spy(*args, original=original, into=into, place=place, **options):
            into |= files_of(args[place])
            return original(*args, **options)

        monkeypatch.setattr(workflow, name, spy)
    original_prune = workflow.prune

    def prune(*args, data, **options):
        used.update(files_of(data))
        return original_prune(*args, data=data, **options)

    monkeypatch.setattr(workflow, "prune", prune)
    compress(shallow, photos, keep_params=None, min_quality=0.95, held_out=8)
    assert used.isdisjoint(compared)
    assert used | compared == {p.name for p in photos.iterdir()}


@pytest.mark.parametrize(
    ("count", "settings", "calibrated", "held_out"),
    [(4, {}, 2, 2), (11, {}, 9, 2), (24, {}, 20, 4), (24, {"limit": 5}, 5, 4), (24, {"held_out": 3}, 21, 3)],
)
def test_how_images_are_shared_out(photos, vit, count, settings, calibrated, held_out):
    files = sorted(photos.iterdir())[:count]
    one, other, _ = workflow.split(files, vit, workflow.Settings(**settings))
    assert (len(one.items), len(other.items)) == (calibrated, held_out)
    assert files_of(one).isdisjoint(files_of(other))
    seeded, _, _ = workflow.split(files, vit, workflow.Settings(seed=1, **settings))
    assert seeded.items != one.items


@pytest.mark.parametrize("count", [2, 3])
def test_too_few_to_hold_any_out(shallow, photos, count):
    result = compress(shallow, sorted(photos.iterdir())[:count])
    assert not result.held_out
    assert result.fidelity.images == count
    assert result.figures()["fidelity"]["held_out"] is False


def test_one_image_is_too_few(shallow, photos):
    with pytest.raises(DataError, match="at least 2 readable images, found 1"):
        compress(shallow, photos / "000.png")


def test_broken_images_take_no_part_and_are_named(shallow, tmp_path):
    folder = write_pictures(tmp_path / "photos", 20)
    (folder / "004.png").write_bytes(b"not an image")
    result = compress(shallow, folder)
    assert list(result.skipped) == [str(folder / "004.png")]
    assert result.figures()["skipped"] == result.skipped
    (folder / "005.png").write_bytes(b"")
    (folder / "006.png").write_bytes(b"")
    with pytest.raises(DataError, match="3 of 20 images cannot be read, at most 10% may fail"):
        compress(shallow, folder)


def test_labels_are_not_used(shallow, classes_folder):
    files = sorted((classes_folder / "train").rglob("*.png"))
    labelled, plain = (compress(shallow, images).model.state_dict() for images in (classes_folder / "train", files))
    assert all(torch.equal(labelled[name], plain[name]) for name in plain)


def test_knn_of_what_was_made(shallow, classes_folder):
    small = compress(shallow, classes_folder / "train", keep_params=0.9).model
    spec = sc.source_of(small).image
    train, test = (sc.batches(classes_folder / part, spec) for part in ("train", "test"))
    assert sc.knn(small, train, test, 1) == 1.0  # the pictures of test/ are among those of train/


# Libraries and methods


class Own(nn.Module):
    """A module that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 8, 8)
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + self.down(self.up(x).relu())).mean(1))


@pytest.mark.parametrize("name", ["hf-dinov2", "hf-clip", "hf-swin", "open_clip"])
def test_models_of_other_libraries(model_folders, photos, tmp_path, name):
    result = compress(model_folders[name], photos, out=tmp_path / "small", keep_params=0.8)
    assert sc.parameters(result.model) <= 0.8 * result.plan.predicted["dense_params"]
    images, again = example_input(result.model), sc.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(features(again, images).embedding, features(result.model, images).embedding)


def test_a_users_module(photos, tmp_path):
    torch.manual_seed(0)
    options = {"model_options": {"image": ImageSpec(size=(32, 32))}}
    result = compress(Own(), photos, out=tmp_path / "small", keep_params=0.8, **options)
    images, again = torch.randn(2, 3, 32, 32), sc.load(tmp_path / "small", model=Own())
    with torch.no_grad():
        assert torch.equal(again(images), result.model(images))
    assert again.up.out_features < 48


@pytest.mark.parametrize(
    ("criterion", "allocator", "compensator", "steps"),
    [
        ("magnitude", "uniform", "none", {"scores", "plan"}),
        ("dgmr", "global", "mean", {"statistics", "scores", "plan"}),
        ("amp", "amp-bisect", "affine", {"statistics", "scores", "plan"}),
    ],
)
def test_only_what_the_methods_need_is_calibrated(
    shallow, photos, monkeypatch, tmp_path, criterion, allocator, compensator, steps
):
    kept = set()
    original = workflow.Steps.keep

    def keep(self, name, *args):
        kept.add(name.partition(".")[0])
        return original(self, name, *args)

    monkeypatch.setattr(workflow.Steps, "keep", keep)
    result = compress(shallow, photos, criterion=criterion, allocator=allocator, compensator=compensator)
    assert kept == steps
    assert sc.parameters(result.model) <= 0.75 * sc.parameters(sc.load_model(shallow))


def test_a_place_that_cannot_be_written_is_found_out_first(shallow, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "load_model", untouched)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("mine")
    for out, message in (
        (tmp_path / "file", "was not written by Secateur"),
        (tmp_path / "file" / "x", "is in the way"),
    ):
        with pytest.raises(ArtifactError, match=message):
            compress(shallow, photos, out=out)
    with pytest.raises(ArtifactError, match="was not written by Secateur; give another folder"):
        compress(shallow, photos, out=photos)
    assert (tmp_path / "file").read_text() == "mine"
