"""open_clip: every config with a tower of its own, made narrow and shallow, and one config for each timm tower."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.open_clip import forward

LAYERS = 2
_TEXT = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1}


def cases() -> list[dict[str, Any]]:
    """One case a config; towers that timm builds are in timm's table, here one for each of their families is enough."""
    import open_clip

    out, seen = [], set()
    for name in sorted(open_clip.list_models(), key=_size):
        tower = open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name")
        word = tower and re.match(r"(vit_pe|[a-z]+)", tower).group(0) + ("siglip" if "siglip" in tower else "")
        if tower is None or word not in seen:
            seen.add(word)
            out.append({"library": "open_clip", "family": _family(name), "name": name, "tower": tower})
    return sorted(out, key=lambda case: case["name"].lower())


def _family(name: str) -> str:
    """Configs of one family differ in sizes and in the text tower only."""
    import open_clip

    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        return "timm tower, " + vision["timm_model_name"]
    parts = ["CoCa" if "multimodal_cfg" in config else "CLIP"]
    parts.append("ResNet" if isinstance(vision["layers"], list) else "ViT")
    parts += ["QuickGELU"] if config.get("quick_gelu") else []
    parts += ["attention pool"] if vision.get("attentional_pool") else []
    parts += ["average pool"] if vision.get("pool_type") == "avg" else []
    parts += ["LayerScale"] if vision.get("ls_init_value") else []
    return ", ".join(parts)


def _size(name: str) -> tuple[float, str]:
    import open_clip

    config = open_clip.get_model_config(name)
    return config["embed_dim"] * config["vision_cfg"].get("image_size", 224), name


def build(case: dict[str, Any]) -> tuple[nn.Module, Tensor, str]:
    """The model, an input, and what was made smaller."""
    import open_clip

    config = open_clip.get_model_config(case["name"])
    vision = config["vision_cfg"]
    config["text_cfg"] = dict(_TEXT)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"width": 64, "heads": 2, "layers": 1}
    built = "text tower replaced by a tiny one"
    if case["tower"] is None:
        head = vision.get("head_width", 64)
        if isinstance(vision["layers"], int):
            vision |= {"layers": LAYERS, "width": 4 * head, "image_size": 4 * vision["patch_size"]}
        else:
            vision |= {"layers": [1, 1, 1, 1], "width": 32, "image_size": 64}
        config["embed_dim"] = 64
        config["text_cfg"]["width"] = 64
        built = f"{vision['layers']} layers, width {vision['width']}, {vision['image_size']} px"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return model.eval(), torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)), built


def caller(case: dict[str, Any]) -> Callable[[nn.Module, Any], Any]:
    """How to call the model of a case: the image side."""
    return forward
