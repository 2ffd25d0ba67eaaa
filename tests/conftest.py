"""Shared fixtures: tiny models of every library, folders as each library saves them, and pictures of every odd kind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from secateur._compat import ensure_torchvision
from secateur.calibration.statistics import LayerSums

ensure_torchvision()
torch.set_num_threads(1)

TIMM = "timm/test_vit"
TIMM_OPTIONS = {"pretrained": False, "img_size": 64, "num_classes": 7}


def sums_of(h_TN: torch.Tensor) -> LayerSums:
    """What calibration would keep of one layer's inputs: T tokens, N features."""
    sums = LayerSums.zeros(h_TN.shape[1])
    for name, value in (
        ("count", torch.tensor(float(len(h_TN)))),
        ("weight", torch.tensor(float(len(h_TN)))),
        ("total", h_TN.sum(0)),
        ("first", h_TN.sum(0)),
        ("square", h_TN.square().sum(0)),
        ("absolute", h_TN.abs().sum(0)),
        ("outer", h_TN.T @ h_TN),
    ):
        sums.add(name, value)
    return sums


def picture(rng: np.random.Generator, width: int = 96, height: int = 80) -> Image.Image:
    """Smooth blotches of colour, with a photograph's spectrum rather than noise's."""
    blotches = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return blotches.resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """PNG files 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        picture(rng).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """24 pictures; not to be changed."""
    return write_pictures(tmp_path_factory.mktemp("photos"), 24)


@pytest.fixture(scope="session")
def classes_folder(tmp_path_factory) -> Path:
    """train/ and test/, each with subfolders a, b and c."""
    root = tmp_path_factory.mktemp("classes")
    for part, count in (("train", 4), ("test", 2)):
        for seed, name in enumerate("abc"):
            write_pictures(root / part / name, count, seed)
    return root


def tiny_timm():
    import secateur as sc

    torch.manual_seed(0)
    return sc.load_model(TIMM, **TIMM_OPTIONS)


@pytest.fixture
def vit():
    """A tiny timm ViT of the test's own."""
    return tiny_timm()


def _tower(**more):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    return {**size, **more}


def hf_models() -> dict:
    """Tiny transformers models, by name: a function that makes each."""
    import transformers as t

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    text |= {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    wide, ratio = _tower(intermediate_size=64), _tower(mlp_ratio=2)
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    return {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**wide, num_labels=5)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**ratio)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=wide, projection_dim=16)),
        "swin": lambda: t.SwinModel(t.SwinConfig(**swin)),
    }


OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 4, "layers": 1},
}


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """Folders as the libraries save them: timm, hf-vit, hf-dinov2, hf-clip, hf-swin, open_clip."""
    import open_clip
    from safetensors.torch import save_file
    from timm.models import save_for_hf

    root = tmp_path_factory.mktemp("models")
    out = {}
    torch.manual_seed(0)
    for name, make in hf_models().items():
        out[f"hf-{name}"] = root / f"hf-{name}"
        make().save_pretrained(out[f"hf-{name}"])
    out["timm"] = root / "timm"
    save_for_hf(tiny_timm(), str(out["timm"]), safe_serialization=True)
    out["open_clip"] = folder = root / "open_clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.2] * 3}})
    )
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return out


@pytest.fixture(scope="session")
def shallow(tmp_path_factory) -> Path:
    """A timm folder with a ViT of two blocks, for what runs the whole pipeline many times."""
    from timm.models import save_for_hf

    import secateur as sc

    torch.manual_seed(0)
    folder, shape = tmp_path_factory.mktemp("shallow") / "vit", {**TIMM_OPTIONS, "depth": 2}
    model = sc.load_model(TIMM, **shape)
    args = {k: v for k, v in shape.items() if k != "pretrained"}
    save_for_hf(model, str(folder), model_config={"model_args": args}, safe_serialization=True)
    return folder


WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "and",
    "nobody",
    "asked",
    "why",
    "dogs",
    "bark",
    "at",
    "night",
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A few thousand words in lines; not to be changed."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(400)))
    return file


@pytest.fixture(scope="session")
def language(tmp_path_factory, text_file) -> Path:
    """A transformers folder with a tiny LLaMA of grouped query heads, and its tokenizer."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("language") / "llama"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train([str(text_file)], trainers.BpeTrainer(vocab_size=96, special_tokens=special))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    t.LlamaForCausalLM(t.LlamaConfig(**size, **heads, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@dataclass
class Ended:
    """What a command printed and its exit status."""

    out: str
    err: str
    status: int

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        lines = self.err.splitlines()
        assert self.status == 1, self
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


def run_command(*arguments: object) -> int:
    """`secateur ARGUMENTS` in this process."""
    from secateur.cli.app import main

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        for name in (
            "TRANSFORMERS_VERBOSITY",
            "HF_HUB_VERBOSITY",
            "TORCH_CPP_LOG_LEVEL",
            "HF_HUB_DISABLE_PROGRESS_BARS",
        ):
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", "80")
        try:
            main()
        except SystemExit as e:
            return e.code or 0
    return 0


@pytest.fixture
def secateur(capfd) -> Callable[..., Ended]:
    """The command line, in this process."""

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        status = run_command(*arguments)
        return Ended(*capfd.readouterr(), status)

    return run


@pytest.fixture(scope="session")
def made(shallow, photos, tmp_path_factory):
    """A folder with stats.safetensors, plan.json and small/, made by the commands."""
    root = tmp_path_factory.mktemp("made")
    stats, plan = root / "stats.safetensors", root / "plan.json"
    assert run_command("calibrate", shallow, "--images", photos, "--out", stats) == 0
    assert run_command("plan", shallow, "--statistics", stats, "--keep-params", 0.75, "--out", plan) == 0
    cut = ("--statistics", stats, "--compensate", "sequential", "--images", photos)
    assert run_command("prune", shallow, "--plan", plan, *cut, "--out", root / "small") == 0
    return root


@pytest.fixture
def here(shallow, photos, made, tmp_path, monkeypatch):
    """An empty working folder with links dense/, photos/, stats.safetensors, plan.json and small/."""
    for name, target in {"dense": shallow, "photos": photos, **{p.name: p for p in made.iterdir()}}.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path
