"""What is saved loads bit-exactly in a fresh process, appears whole or not at all, and is checked before it is used."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from conftest import TIMM, TIMM_OPTIONS, tiny_timm
from secateur.artifact.about import About
from secateur.errors import ArtifactError, SecateurError, SecateurWarning, SourceError
from secateur.files import atomic_folder
from secateur.models import ImageSpec, attach, example_input, features, source_of
from secateur.models.source import Source
from secateur.surgery import plan_of, recipe_of
from test_models import FOLDERS, Trap


def cut(model, share=0.85):
    """A model cut by magnitude, with biases refit nowhere."""
    anatomy = sc.inspect(model)
    scores = sc.score(None, "magnitude", model=model, anatomy=anatomy)
    plan = sc.allocate(scores, sc.Budget(params=share), "uniform", anatomy=anatomy, align=1)
    return sc.prune(model, plan, anatomy=anatomy, compensate="none")


def load_dense(spec, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        return sc.load_model(spec, **options)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    return sc.save(cut(tiny_timm()), tmp_path_factory.mktemp("saved") / "small", figures={"cosine": 0.5})


@pytest.fixture
def saved(saved_once, tmp_path):
    """A folder with a cut model, of the test's own."""
    return Path(shutil.copytree(saved_once, tmp_path / "small"))


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def assert_same(a, b) -> None:
    """Every parameter and buffer, saved or computed, with its type; ties; and the features."""
    one, two = tensors_of(a), tensors_of(b)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name
        assert isinstance(one[name], nn.Parameter) == isinstance(two[name], nn.Parameter), name
        assert one[name].requires_grad == two[name].requires_grad, name
    assert {n for n, _ in a.named_parameters()} == {n for n, _ in b.named_parameters()}
    images = example_input(a)
    with torch.no_grad():
        assert torch.equal(features(a, images).embedding, features(b, images).embedding)


# In this process


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_cut_model_comes_back(model_folders, tmp_path, name, dtype):
    small = cut(load_dense(model_folders[name])).to(dtype)
    folder = sc.save(small, tmp_path / "small")
    again = sc.load(folder)
    assert_same(small, again)
    assert plan_of(again) == plan_of(small)
    assert recipe_of(again) == recipe_of(small)
    assert source_of(again) == source_of(small)
    second = sc.save(again, tmp_path / "again")  # and can be saved again
    assert_same(small, sc.load_model(second))
    assert (second / "secateur.json").read_text() == (folder / "secateur.json").read_text()


def test_a_dense_model_comes_back_without_a_plan(vit, tmp_path):
    again = sc.load(sc.save(vit, tmp_path / "dense"))
    assert_same(vit, again)
    assert plan_of(again) is None
    assert not (tmp_path / "dense" / "plan.json").exists()


def test_what_is_in_the_folder(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "plan.json", "secateur.json"]
    assert json.loads((saved / "secateur.json").read_text())["figures"] == {"cosine": 0.5}
    assert json.loads((saved / "config.json").read_text())["architecture"] == "test_vit"
    (saved.parent / "touched").touch()
    assert {p.stat().st_mode for p in saved.iterdir()} == {(saved.parent / "touched").stat().st_mode}


def test_the_librarys_own_config_opens_the_dense_architecture(model_folders, tmp_path):
    import transformers

    folder = sc.save(cut(load_dense(model_folders["hf-dinov2"])), tmp_path / "small")
    assert transformers.AutoConfig.from_pretrained(folder).hidden_size == 32
    folder = sc.save(cut(load_dense(model_folders["open_clip"])), tmp_path / "clip")
    assert json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]["mean"] == [0.4] * 3


@pytest.mark.parametrize("compensate", ["mean", "affine", "sequential"])
def test_added_biases_come_back(photos, tmp_path, compensate):
    model = load_dense(TIMM, **TIMM_OPTIONS, qkv_bias=False, proj_bias=False)
    assert model.blocks[0].mlp.fc2.bias is None
    statistics = sc.calibrate(model, photos)
    plan = sc.allocate(sc.score(statistics, "obs"), sc.Budget(params=0.8))
    small = sc.prune(model, plan, stats=statistics, compensate=compensate, data=photos)
    assert any(b.mlp.fc2.bias is not None for b in small.blocks)
    assert recipe_of(small).biases
    assert_same(small, sc.load(sc.save(small, tmp_path / "small")))


def test_cut_buffers_that_no_checkpoint_holds(tmp_path):
    """Swin's relative-position bias table shrinks with the heads, and its index table is computed."""
    options = {"pretrained": False, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4), "img_size": 56}
    small = cut(load_dense("timm/swin_tiny_patch4_window7_224", **options))
    computed = set(tensors_of(small)) - set(small.state_dict())
    assert any("relative_position_index" in name for name in computed)
    assert_same(small, sc.load(sc.save(small, tmp_path / "small")))


class Own(nn.Module):
    """Tied weights, a computed buffer that is cut along, a frozen parameter and two views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.last = nn.Linear(16, 8)
        self.twin = nn.Linear(8, 16)
        self.twin.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, 16), persistent=False)
        whole = torch.randn(16)
        self.register_buffer("left", whole[:8])
        self.register_buffer("right", whole[8:])

    def forward(self, x):
        x = x.flatten(1)[:, :8] + self.frozen
        return self.last((self.first(x) + self.twin(x)).relu() * self.gain) + self.left - self.right


def own() -> nn.Module:
    torch.manual_seed(3)
    return attach(Own().eval(), Source("module", "Own", image=ImageSpec(size=(4, 4))))


def test_a_users_module(tmp_path):
    small = cut(own(), 0.7)
    assert small.gain.shape == small.twin.weight.shape[:1] != (16,)
    folder = sc.save(small, tmp_path / "small")
    weights = load_file(folder / "model.safetensors")
    assert ("first.weight" in weights) != ("twin.weight" in weights)
    again = sc.load(folder, model=Own())
    assert_same(small, again)
    assert again.twin.weight is again.first.weight
    assert not again.frozen.requires_grad
    with pytest.raises(SourceError, match=r"load\(folder, model=YourModule"):
        sc.load(folder)
    with pytest.raises(ArtifactError, match="the skeleton does not fit this model"):
        sc.load(folder, model=nn.Linear(8, 8))


def test_computed_buffers_keep_their_type(tmp_path):
    model = own()
    model.gain = model.gain.double()
    again = sc.load(sc.save(model, tmp_path / "own"), model=Own())
    assert again.gain.dtype == torch.float64


def test_weights_tied_by_hand_stay_tied(tmp_path):
    small = cut(load_dense(TIMM, **TIMM_OPTIONS))
    small.blocks[1].norm1.weight = small.blocks[0].norm1.weight
    again = sc.load(sc.save(small, tmp_path / "small"))
    assert again.blocks[1].norm1.weight is again.blocks[0].norm1.weight


# In another process

FRESH = """
import sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
import secateur as sc
from secateur.models import features
for folder in map(Path, sys.argv[1:]):
    model = None
    if folder.name == "own":
        sys.path.insert(0, str(Path("{tests}")))
        from test_artifact import Own
        model = Own()
    model = sc.load(folder, model=model)
    expected = load_file(folder.with_suffix(".expected"))
    with torch.no_grad():
        found = features(model, expected["images"]).embedding
    print(folder.name, torch.equal(found, expected["features"]))
"""


def test_every_library_in_a_fresh_process(model_folders, tmp_path):
    models = {name: cut(load_dense(model_folders[name])) for name in FOLDERS}
    models["bfloat16"] = cut(load_dense(TIMM, **TIMM_OPTIONS)).to(torch.bfloat16)
    models["own"] = cut(own(), 0.7)
    for name, model in models.items():
        sc.save(model, tmp_path / name)
        images = example_input(model)
        with torch.no_grad():
            expected = {"images": images, "features": features(model, images).embedding.contiguous()}
        save_file(expected, tmp_path / f"{name}.expected")
    code = FRESH.replace("{tests}", str(Path(__file__).parent))
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in models)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{name} True" for name in models], done.stderr


@pytest.mark.parametrize("old", [True, False])
def test_a_killed_save_leaves_the_old_folder_or_nothing(saved, vit, tmp_path, old, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def die(tensors, path, **_):
        path.write_bytes(b"half of the weights")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("safetensors.torch.save_file", die)
    child = os.fork()
    if not child:
        try:
            sc.save(vit, saved if old else tmp_path / "new")
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left[1:] == ["small"]
    assert left[0].startswith(".small.writing." if old else ".new.writing.")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


# Where it cannot be written


def test_a_full_disk_leaves_the_old_folder(saved, vit, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("safetensors.torch.save_file", "pathlib.Path.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(ArtifactError, match="disk is full"):
                sc.save(vit, saved)
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
        assert [p.name for p in saved.parent.iterdir()] == ["small"]


def test_a_really_full_disk(vit, small_disk, tmp_path):
    with pytest.raises(ArtifactError, match="disk is full"):
        sc.save(vit, small_disk / "small")
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ArtifactError, match="no permission"):
        sc.save(vit, small_disk / "small")


def test_other_things_are_not_overwritten(vit, photos):
    with pytest.raises(ArtifactError, match="was not written by Secateur"):
        sc.save(vit, photos)
    assert len(list(photos.iterdir())) == 24


@pytest.mark.parametrize("figures", [{"model": object()}, {1: {2}}])
def test_figures_are_data(vit, tmp_path, figures):
    with pytest.raises(ArtifactError, match="only plain data can be saved"):
        sc.save(vit, tmp_path / "x", figures=figures)
    assert list(tmp_path.iterdir()) == []


def test_figures_that_json_does_not_know(vit, tmp_path):
    folder = sc.save(vit, tmp_path / "x", figures={"a": float("nan"), "b": (1.0, float("inf"))})
    about = json.loads((folder / "secateur.json").read_text(), parse_constant=pytest.fail)
    assert about["figures"] == {"a": None, "b": [1.0, None]}


def test_models_that_cannot_be_saved(vit, tmp_path):
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(ArtifactError, match="'weight' has no data"):
        sc.save(empty, tmp_path / "x")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

    with pytest.raises(ArtifactError, match="'_extra_state' is a dict"):
        sc.save(Extra(2, 2), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_models_that_their_library_cannot_rebuild_are_announced(vit, tmp_path):
    vit.head = nn.Linear(64, 3)
    with pytest.warns(SecateurWarning, match=r"cannot be rebuilt.*'head.bias' is \[3\], rebuilt \[7\].*model=..."):
        folder = sc.save(vit, tmp_path / "small")
    with pytest.raises(ArtifactError, match=r"'head.bias' is \[3\]|'head.weight' is \[3, 64\]"):
        sc.load(folder)
    skeleton = load_dense(TIMM, **TIMM_OPTIONS)
    skeleton.head = nn.Linear(64, 3)
    assert_same(vit, sc.load(folder, model=skeleton))
    model = load_dense(TIMM, pretrained=False, act_layer=nn.ReLU)
    with pytest.warns(SecateurWarning, match="was built with act_layer"):
        sc.save(model, tmp_path / "relu")


# What is not believed


def edit(folder: Path, change) -> None:
    """Change secateur.json: a dict merged in, or a function of its contents."""
    file = folder / "secateur.json"
    data = json.loads(file.read_text())
    data = change(data) if callable(change) else data | change
    file.write_text(json.dumps(data))


def refused(folder: Path, message: str = "") -> None:
    with pytest.raises(SecateurError, match=message) as caught:
        sc.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_none_of_ours(tmp_path):
    refused(tmp_path, "holds no secateur.json; give a folder that Secateur wrote")
    refused(tmp_path / "none", "holds no secateur.json")


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_missing_truncated_and_swapped_files(saved, vit, tmp_path, name):
    other = sc.save(cut(vit, 0.9), tmp_path / "other")
    original = (saved / name).read_bytes()
    for contents in (b"", original[:100], original[:-1], original + b" ", (other / name).read_bytes()):
        (saved / name).write_bytes(contents)
        refused(saved, "is damaged or another model's")
    (saved / name).unlink()
    refused(saved, "is missing")


def test_one_changed_bit_is_found(saved):
    raw = bytearray((saved / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (saved / "model.safetensors").write_bytes(raw)
    refused(saved, "is damaged or another model's")


def rehashed(folder: Path) -> None:
    from secateur.files import sha256

    edit(folder, {"sha256": {p.name: sha256(p) for p in folder.iterdir() if p.name != "secateur.json"}})


@pytest.mark.parametrize("contents", [b"", b"\x08", b"\xff" * 100, b"{}" * 50])
def test_bad_weights_with_the_right_hash(saved, contents):
    (saved / "model.safetensors").write_bytes(contents)
    rehashed(saved)
    refused(saved, "is not readable")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this Secateur reads up to 1; upgrade"),
        ({"format": 0}, "no format number"),
        ({"format": True}, "no format number"),
        ({"format": "1"}, "no format number"),
        ({"source": None}, "damaged at 'source'"),
        ({"source": {"library": 3}}, "damaged at 'source.library'"),
        ({"source": {"image": {"size": 3}}}, "damaged at 'source.image.size'"),
        ({"sha256": {}}, "does not say what 'model.safetensors' hashes to"),
        ({"sha256": 3}, "damaged at 'sha256'"),
        ({"tied": {"head.bias": "norm.bias"}}, "ties 'head.bias' to 'norm.bias'"),
        ({"tied": {"nowhere": "norm.bias"}}, "has a tensor 'nowhere' that the model does not know"),
        ({"tied": {"../../etc/passwd": "norm.bias"}}, "does not know"),
        ({"tied": []}, "damaged at 'tied'"),
        ({"buffers": {"nowhere": "float32"}}, "no buffer 'nowhere'"),
        ({"buffers": {"pos_embed": "load"}}, "no buffer 'pos_embed'"),
        ({"recipe": {"surprise": 1}}, "damaged at 'surprise'"),
        ({"recipe": []}, "damaged at 'recipe'"),
        ({"recipe": {}}, r"is \[.*\] in .* in the skeleton"),
        ({"recipe": {"attributes": [["blocks.0", "training", 1]]}}, "refusing to set 'blocks.0.training'"),
        ({"recipe": {"attributes": [["", "__class__", 1]]}}, "refusing to set|does not fit"),
        ({"recipe": {"attributes": [["", "forward", 1]]}}, "refusing to set"),
        ({"recipe": {"attributes": [["nowhere", "num_heads", 1]]}}, "does not fit this model|skeleton does not fit"),
        ({"recipe": {"attributes": [["", "num_classes", "x"]]}}, "damaged at 'attributes"),
        ({"recipe": {"shapes": {"head.bias": [10**12]}}}, r"says that 'head.bias' is \[1000000000000\]"),
        ({"recipe": {"shapes": {"nowhere": [1]}}}, "its weights hold no such tensor"),
        ({"recipe": {"biases": ["nowhere.bias"]}}, "lacks the weights of 'nowhere.bias'"),
        ({"recipe": {"headwise": ["blocks.0"]}}, "expected nn.MultiheadAttention"),
        ({"recipe": {"rewritten": [["blocks.0.norm1", {"x": 1}]]}}, "cannot be rewritten"),
    ],
)
def test_a_damaged_or_dishonest_secateur_json(saved, change, message):
    edit(saved, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        sc.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '"\\ud800"'])
def test_a_secateur_json_that_is_not_json(saved, text):
    (saved / "secateur.json").write_text(text)
    refused(saved)


def test_a_binary_secateur_json(saved):
    (saved / "secateur.json").write_bytes(b"\xff\xfe\x00")
    refused(saved, "not valid JSON")


def test_other_names_in_the_weights(saved):
    weights = load_file(saved / "model.safetensors")
    for change, message in (
        ({"surprise": torch.zeros(1)}, "has a tensor 'surprise' that the model does not know"),
        ({"blocks.0.attn.scale": torch.zeros(1)}, "does not know"),
        ({"head.bias": torch.zeros(8)}, r"'head.bias' is \[8\] in .* and \[7\] in the skeleton"),
        ({"head.bias": None}, "lacks 1 tensors of the model, first 'head.bias'"),
    ):
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        save_file(changed, saved / "model.safetensors")
        rehashed(saved)
        refused(saved, message)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_secateur_json_loads_or_is_refused(saved, data, tmp_path_factory):
    original = json.loads((saved / "secateur.json").read_text())
    folder = tmp_path_factory.mktemp("changed")
    for name in ("model.safetensors", "plan.json"):
        os.link(saved / name, folder / name)
    keys = data.draw(st.lists(st.sampled_from(["format", "source", "recipe", "tied", "buffers", "sha256"]), min_size=1))
    for key in keys:
        inner = original[key]
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(json_values)
        else:
            original[key] = data.draw(json_values)
    (folder / "secateur.json").write_text(json.dumps(original))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sc.load(folder)
        except SecateurError as e:
            assert "Traceback" not in str(e)


def test_nothing_in_our_folder_is_unpickled(saved, tmp_path):
    mark = tmp_path / "unpickled"
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pth"):
        (saved / name).write_bytes(pickle.dumps(Trap(mark)))
    sc.load(saved)
    (saved / "model.safetensors").write_bytes(pickle.dumps(Trap(mark)))
    rehashed(saved)
    refused(saved, "is not readable")
    assert not mark.exists()


def test_a_source_that_would_load_another_file(saved, tmp_path):
    mark = tmp_path / "unpickled"
    (tmp_path / "trap.pt").write_bytes(pickle.dumps(Trap(mark)))

    def add(data):
        data["source"]["config"]["model_args"]["checkpoint_path"] = str(tmp_path / "trap.pt")
        return data

    edit(saved, add)
    with pytest.raises(SourceError, match="refusing to pass 'checkpoint_path'"):
        sc.load(saved)
    assert not mark.exists()


def test_options_do_not_go_with_a_saved_folder(saved):
    for options in ({"pretrained": False}, {"weights": "w.pt"}, {"img_size": 32}):
        with pytest.raises(SourceError, match="was written by Secateur and takes no"):
            sc.load_model(saved, **options)


def test_about_reads_what_it_wrote(tmp_path):
    about = About(source=Source("timm", "x", {"a": [1]}), sha256={"f": "0"}, figures={"x": 1.5})
    with atomic_folder(tmp_path / "x") as folder:
        about.write(folder)
    assert About.read(tmp_path / "x") == about


def test_loading_gives_eval_mode_and_a_place_to_cut_again(saved):
    model = sc.load(saved)
    assert not model.training
    assert sc.inspect(model).cuttable
