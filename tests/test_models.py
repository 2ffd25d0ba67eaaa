"""Models of every library, local folder and hand load, say what they are, and refuse in one line."""

import json
import logging
import pickle
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from conftest import OPEN_CLIP, TIMM, TIMM_OPTIONS, hf_models
from secateur.errors import SecateurWarning, SourceError
from secateur.models import ImageSpec, build, example_input, features, source_of
from secateur.models.source import Source

FOLDERS = ["timm", "hf-vit", "hf-dinov2", "hf-clip", "hf-swin", "open_clip"]


def load(spec, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        return sc.load_model(spec, **options)


def own_features(model, images):
    """What the library itself calls the features of a model."""
    with torch.no_grad():
        if hasattr(model, "encode_image"):
            return model.encode_image(images)
        if hasattr(model, "forward_head"):
            return model.forward_head(model.forward_features(images), pre_logits=True)
        if hasattr(model, "get_image_features"):
            out = model.get_image_features(pixel_values=images)
            return getattr(out, "pooler_output", out)
        if hasattr(model, "vit"):
            return model.vit(images).last_hidden_state[:, 0]  # after the last norm, as its classifier gets it
        return model(pixel_values=images).pooler_output


@pytest.mark.parametrize("name", FOLDERS)
def test_local_folders(model_folders, name):
    model = load(model_folders[name])
    source = source_of(model)
    assert source.library == name.partition("-")[0]
    assert not model.training
    if source.library == "hf":
        weights = type(model).from_pretrained(model_folders[name]).state_dict()
    else:
        weights = load_file(next(model_folders[name].glob("*.safetensors")))
    state = model.state_dict()
    assert all(torch.equal(state[k], weights[k]) for k in weights)
    images = example_input(model)
    assert images.shape == (2, 3, *source.image.size)
    found = features(model, images)
    torch.testing.assert_close(found.embedding, own_features(model, images), atol=1e-5, rtol=1e-4)
    assert found.patches is None or found.patches.shape[0] == 2


@pytest.mark.parametrize("name", FOLDERS)
def test_a_skeleton_is_rebuilt_from_the_source_alone(model_folders, name):
    model = load(model_folders[name])
    before = torch.get_rng_state()
    again = build(Source.from_dict(json.loads(json.dumps(source_of(model).to_dict()))))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(again) is type(model)
    assert source_of(again) == source_of(model)
    again.load_state_dict(model.state_dict())
    images = example_input(model)
    assert torch.equal(features(again, images).embedding, features(model, images).embedding)


def test_by_name_with_random_weights():
    model = load(TIMM, **TIMM_OPTIONS)
    assert source_of(model).image == ImageSpec((64, 64), (0.5,) * 3, (0.5,) * 3, 0.95)
    assert features(model, example_input(model)).logits.shape == (2, 7)
    clip = load("open_clip/ViT-S-32-alt", pretrained=False, img_size=64)
    assert example_input(clip).shape == (2, 3, 64, 64)
    assert source_of(clip).config["vision_cfg"]["image_size"] == 64


@pytest.mark.parametrize(("channels", "mean"), [(1, (0.5,)), (4, (0.5,) * 4)])
def test_other_numbers_of_channels(channels, mean):
    model = load(TIMM, pretrained=False, img_size=64, in_chans=channels)
    image = source_of(model).image
    assert (image.channels, image.mean) == (channels, mean)
    assert example_input(model).shape == (2, channels, 64, 64)


def test_timm_weights_from_a_file(vit, tmp_path):
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        again = load(TIMM, weights=str(tmp_path / name), img_size=64, num_classes=7)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vit.parameters(), strict=True))
        assert load(TIMM, weights=str(tmp_path / name), img_size=64, num_classes=0).num_classes == 0


@pytest.mark.parametrize("name", FOLDERS)
def test_modules_made_elsewhere_are_recognised(model_folders, name):
    spec = load(model_folders[name])
    object.__delattr__(spec, "secateur_source")
    again = sc.load_model(spec)
    assert again is spec
    assert source_of(spec).library == name.partition("-")[0]
    assert source_of(spec).image.size == ((64, 64) if name == "timm" else (32, 32))


def test_a_module_of_ones_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert sc.load_model(model) is model
    assert source_of(model).library == "module"
    wanted = ImageSpec(size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    sc.load_model(model, image=wanted)
    assert source_of(model).image == wanted
    assert features(model, example_input(model)).embedding.shape == (2, 4)
    with pytest.raises(SourceError, match="pass a freshly built one"):
        build(source_of(model))


def test_images_follow_the_models_type(vit):
    vit.to(torch.bfloat16)
    found = features(vit, torch.randn(2, 3, 64, 64))
    assert found.embedding.dtype == torch.bfloat16


# transformers


def test_a_missing_pooler_is_left_out_and_not_made_up(tmp_path):
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**size, image_size=16, patch_size=8)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.pooler is None
    images = example_input(model)
    assert torch.equal(features(model, images).embedding, model(images).last_hidden_state[:, 0])
    assert build(source_of(model)).pooler is None


def test_other_missing_weights_are_announced(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["hf-vit"], tmp_path / "vit")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(SecateurWarning, match=r"lacks 1 weights.*first 'classifier.weight': they were set at random"):
        sc.load_model(folder)


def test_normalisation_comes_from_the_image_processor(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["hf-dinov2"], tmp_path / "dinov2")
    with pytest.warns(SecateurWarning, match="no preprocessor_config.json"):
        assert source_of(sc.load_model(folder)).image.mean == (0.5,) * 3
    processor = {
        "image_processor_type": "BitImageProcessor",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 24, "width": 24},
        "do_center_crop": True,
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    wanted = ImageSpec((24, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 24 / 40, "bilinear")
    assert source_of(sc.load_model(folder)).image == wanted
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"do_normalize": False}))
    assert source_of(sc.load_model(folder)).image.std == (1.0,) * 3


def test_the_kind_of_attention_is_kept(model_folders):
    model = load(model_folders["hf-vit"], attn_implementation="eager")
    assert build(source_of(model)).config._attn_implementation == "eager"


def test_models_that_read_text_get_tokens(tmp_path):
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokens = example_input(sc.load_model(tmp_path))
    assert tokens.shape == (2, 64)
    assert not tokens.is_floating_point()
    assert int(tokens.max()) < 20


def test_models_that_read_something_else_say_so():
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**size))
    with pytest.raises(SourceError, match="Wav2Vec2Model reads input_values, neither images nor text"):
        example_input(model)


def test_nothing_is_said_while_loading(model_folders, capfd):
    handlers = list(logging.getLogger().handlers)
    for name in FOLDERS:
        build(source_of(load(model_folders[name])))
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers


# What cannot be loaded


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("", {}, "neither a folder nor a known form; give 'timm/NAME', 'hf/ORG/NAME', 'open_clip/NAME:TAG'"),
        ("no/such/folder", {}, "neither a folder nor a known form; give 'timm/NAME'"),
        ("vit_tiny", {}, "did you mean 'timm/vit_tiny'"),
        ("facebook/dinov2-base", {}, "did you mean 'hf/facebook/dinov2-base'"),
        ("timm/", {}, "give 'timm/NAME'"),
        (3, {}, "cannot load a model from a int; give 'timm/NAME'"),
        (None, {}, "cannot load a model from a NoneType"),
        ("timm/vit_smal_patch14_dino", {}, "close names: vit_small_patch14_dinov2"),
        ("timm/zzzz", {}, "timm has no model 'zzzz'; see timm.list_models"),
        ("timm/test_vit.nope", {}, "no weights 'nope' for 'test_vit'; it has: r160_in1k"),
        ("timm/test_vit", {"weights": "none.pt"}, "weights file 'none.pt' does not exist"),
        ("timm/test_vit", {"weights": __file__}, "give a checkpoint of this very model"),
        ("timm/test_vit", {"pretrained": False, "surprise": 1}, "could not build 'test_vit' with {'surprise': 1}"),
        ("open_clip/ViT-B-33", {}, "close names: ViT-B-32"),
        ("open_clip/ViT-B-32", {}, "name the weights: 'open_clip/ViT-B-32:TAG' with TAG one of openai"),
        ("open_clip/ViT-B-32:nope", {}, "no weights 'nope' for 'ViT-B-32'"),
        ("open_clip/ViT-B-32", {"weights": "none.pt"}, "weights file 'none.pt' does not exist"),
        ("open_clip/ViT-B-32", {"pretrained": False, "surprise": 1}, "cannot be loaded with pretrained, surprise"),
        ("hf/x/y", {"weights": "a.safetensors"}, "take no weights file"),
        ("hf/x/y", {"img_size": 64}, "image size of a transformers model"),
        (nn.Linear(2, 2), {"pretrained": False}, "'Linear' cannot be loaded with pretrained"),
    ],
)
def test_what_cannot_be_loaded_says_what_can(spec, options, message):
    with pytest.raises(SourceError) as caught:
        sc.load_model(spec, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["timm/vit_tiny_patch16_224", "hf/facebook/no-such-model", "open_clip/ViT-B-32:openai"]
)
def test_an_unreachable_hub_is_not_waited_for(spec, monkeypatch, tmp_path):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(SourceError, match="where no hub is reachable, give a local folder"):
        sc.load_model(spec)
    assert not slept


DAMAGE = ["no weights", "truncated weights", "weights of another model"]
DAMAGE += ["truncated config", "a list for a config", "no config"]


def damage(folder: Path, kind: str) -> None:
    config = folder / ("open_clip_config.json" if folder.name == "open_clip" else "config.json")
    weights = next(folder.glob("*.safetensors"))
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "truncated config":
        config.write_text(config.read_text()[:40])
    elif kind == "a list for a config":
        config.write_text("[]")
    elif kind == "weights of another model":
        save_file({"a": torch.zeros(3)}, weights, metadata={"format": "pt"})
    elif kind == "no config":
        config.unlink()


@pytest.mark.parametrize("name", ["timm", "hf-dinov2", "open_clip"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders(model_folders, tmp_path, name, kind):
    folder = shutil.copytree(model_folders[name], tmp_path / name)
    damage(folder, kind)
    if (name, kind) == ("hf-dinov2", "weights of another model"):
        with pytest.warns(SecateurWarning, match="were set at random"):
            sc.load_model(folder)
        return
    with pytest.raises(SourceError) as caught:
        sc.load_model(folder)
    assert str(folder) in str(caught.value) or name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else(photos):
    with pytest.raises(SourceError, match="has neither secateur"):
        sc.load_model(photos)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["timm", "hf-dinov2", "open_clip"])
@pytest.mark.parametrize("instead", [True, False], ids=["instead of safetensors", "beside safetensors"])
def test_nothing_is_unpickled(model_folders, tmp_path, name, instead):
    folder, mark = shutil.copytree(model_folders[name], tmp_path / name), tmp_path / "unpickled"
    (tmp_path / "trap.pt").write_bytes(pickle.dumps(Trap(mark)))
    for file in ("pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pth", "optimizer.pt"):
        shutil.copy(tmp_path / "trap.pt", folder / file)
    if instead:
        next(folder.glob("*.safetensors")).unlink()
        with pytest.raises(SourceError):
            load(folder)
    else:
        load(folder)
    for spec in ("timm/test_vit", "open_clip/ViT-S-32-alt"):
        with pytest.raises(SourceError):
            load(spec, weights=str(tmp_path / "trap.pt"))
    assert not mark.exists()
    pickle.loads((tmp_path / "trap.pt").read_bytes())
    assert mark.exists()  # the trap does work


def test_the_code_of_a_folder_is_not_run(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["hf-dinov2"], tmp_path / "dinov2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "unheard-of"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SourceError):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_config_cannot_name_just_any_class(model_folders):
    config = load(model_folders["hf-dinov2"]).config
    for name in ("pipeline", "AutoConfig", "__doc__", "no_such_class"):
        config.architectures = [name]
        from secateur.models.hf import model_class

        assert model_class(config).__name__ == "Dinov2Model"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "hf-hub:x/y", "model_args": {}}, "timm has no architecture 'hf-hub:x/y'"),
        ({"architecture": "local-dir:/tmp", "model_args": {}}, "timm has no architecture"),
        ({"architecture": 3, "model_args": {}}, "timm has no architecture '3'"),
        ({"architecture": "test_vit", "model_args": []}, "timm has no architecture"),
        ({"architecture": "test_vit", "model_args": {"checkpoint_path": "x.pt"}}, "refusing to pass 'checkpoint_path'"),
        ({"architecture": "test_vit", "model_args": {"pretrained": True}}, "refusing to pass 'pretrained'"),
        ({"architecture": "test_vit", "model_args": {"act_layer": {"a": 1}}}, "refusing to pass 'act_layer'"),
        ({"architecture": "test_vit", "model_args": {"depth": "x"}}, "could not build"),
        ({}, "timm has no architecture"),
    ],
)
def test_a_source_cannot_make_timm_load_something_else(config, message):
    with pytest.raises(SourceError, match=message):
        build(Source("timm", "x", config))


@pytest.mark.parametrize("library", ["hf", "open_clip", "pickle"])
@pytest.mark.parametrize("config", [{}, {"model_type": "unheard-of"}, {"model_type": "vit", "hidden_size": "x"}])
def test_sources_that_make_no_sense(library, config):
    with pytest.raises(SourceError):
        build(Source(library, "x", config))


def test_arguments_that_cannot_be_saved_are_remembered():
    model = load(TIMM, pretrained=False, act_layer=nn.ReLU)
    with pytest.raises(SourceError, match="was built with act_layer="):
        build(source_of(model))


@pytest.mark.parametrize("change", [{"image": 3}, {"image": {"size": [1]}}, {"config": []}, {"name": None}])
def test_sources_as_data_are_checked(change):
    data = json.loads(json.dumps(Source("timm", "x", {}).to_dict()))
    assert Source.from_dict(data) == Source("timm", "x", {})
    with pytest.raises(ValueError, match="validation error"):
        Source.from_dict(data | change)


def test_the_tiny_models_are_what_they_are_called():
    assert set(hf_models()) == {n.removeprefix("hf-") for n in FOLDERS if n.startswith("hf-")}
    assert OPEN_CLIP["vision_cfg"]["image_size"] == 32
