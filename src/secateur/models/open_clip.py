"""Models of open_clip: `ViT-B-32` or `ViT-B-32:tag`, local folders; the image tower is what is seen and cut."""

from __future__ import annotations

import difflib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._compat import ensure_torchvision
from secateur.errors import SourceError, reason
from secateur.models.hub import NO_HUB, library_call
from secateur.models.source import Features, ImageSpec, Library, Source, attach

CONFIG = "open_clip_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def _open_clip():
    ensure_torchvision()
    try:
        import open_clip
    except ImportError as e:
        raise SourceError(f"open_clip cannot be imported ({e}): pip install 'secateur[vision]'") from e
    return open_clip


def load(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | None = None,
    img_size: int | None = None,
    quick_gelu: bool | None = None,
) -> nn.Module:
    """An open_clip model by name; the part behind a colon is the tag of its pretrained weights.

    Args:
        name: `ViT-B-32` or `ViT-B-32:tag`.
        pretrained: False for random weights.
        weights: local checkpoint instead of a tag (read without unpickling code).
        img_size: build it for this image size.
        quick_gelu: whether the weights were trained with the fast GELU; the architecture's own choice by default.

    Raises:
        SourceError: no such model or tag (the answer names those there are), or the weights cannot be had.
    """
    open_clip = _open_clip()
    architecture, _, tag = name.partition(":")
    config = open_clip.get_model_config(architecture)
    if config is None:
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=5, cutoff=0.5)
        hint = f"close names: {', '.join(close)}" if close else "see open_clip.list_models()"
        raise SourceError(f"open_clip has no model '{architecture}'; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained and not weights and tag not in tags:
        said = f"open_clip has no weights '{tag}' for '{architecture}'" if tag else "name the weights"
        some = ", ".join(tags[:8]) + (", ..." if len(tags) > 8 else "")
        raise SourceError(f"{said}: 'open_clip/{architecture}:TAG' with TAG one of {some or 'none'}")
    if weights and not Path(weights).is_file():
        raise SourceError(f"weights file '{weights}' does not exist; give a .safetensors, .pt or .bin file")
    if img_size is not None:
        config["vision_cfg"]["image_size"] = img_size
    if quick_gelu is not None:
        config["quick_gelu"] = quick_gelu
    try:
        with library_call():
            model = open_clip.create_model(
                architecture,
                pretrained=weights or (tag if pretrained else None),
                force_image_size=img_size,
                force_quick_gelu=bool(quick_gelu),
            )
    except Exception as e:
        if weights:
            told = f"could not load '{weights}' into '{name}' ({reason(e)}); give a checkpoint of this very model"
        else:
            told = f"could not load the weights of '{name}' ({reason(e)}); {NO_HUB} or a file (weights=..., --weights)"
        raise SourceError(told) from e
    return attach(model.eval(), _source(model, name, config, weights))


def open_folder(folder: str | Path, *, pretrained: bool = True, weights: str | None = None) -> nn.Module:
    """A folder with open_clip_config.json and weights.

    Raises:
        SourceError: the folder is incomplete or damaged.
    """
    open_clip, folder = _open_clip(), Path(folder)
    if weights is not None:
        raise SourceError(f"'{folder}' has weights of its own; give a model name along with a weights file")
    if pretrained and not any(f.suffix in _WEIGHTS for f in folder.iterdir()):
        raise SourceError(f"'{folder}' holds {CONFIG} but no weights (model.safetensors); copy it again")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        with library_call():
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=pretrained)
    except Exception as e:
        raise SourceError(f"open_clip could not open the folder '{folder}' ({reason(e)}); copy it again") from e
    return attach(model.eval(), _source(model, str(folder), config, None))


def _source(model: Any, name: str, config: dict[str, Any], weights: str | None) -> Source:
    visual = model.visual
    size = visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    cfg = getattr(visual, "preprocess_cfg", {})
    image = ImageSpec(
        size,
        tuple(cfg.get("mean", getattr(visual, "image_mean", None) or (0.48145466, 0.4578275, 0.40821073))),
        tuple(cfg.get("std", getattr(visual, "image_std", None) or (0.26862954, 0.26130258, 0.27577711))),
        1.0,
        cfg.get("interpolation", "bicubic"),
    )
    return Source("open_clip", name, json.loads(json.dumps(config)), image, weights)


def recognise(model: Any) -> Source | None:
    """The Source of a model that open_clip made elsewhere; it does not carry its config, so it can be saved but must be
    built again by its user to be loaded."""
    if not type(model).__module__.startswith("open_clip.") or not hasattr(model, "encode_image"):
        return None
    return _source(model, type(model).__name__, {}, None)


def build(source: Source) -> nn.Module:
    """The dense skeleton, with random weights.

    Raises:
        SourceError: open_clip cannot build it, or its config is not known.
    """
    open_clip = _open_clip()
    if not source.config:
        raise SourceError(
            f"'{source.name}' was made outside Secateur and carries no config: build the dense model again and give "
            "it, load(folder, model=...)"
        )
    try:
        with library_call(), tempfile.TemporaryDirectory() as folder:
            (Path(folder) / CONFIG).write_text(json.dumps({"model_cfg": source.config}), encoding="utf-8")
            return open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=False,
                pretrained_image=False,
                pretrained_text=False,
                device=torch.get_default_device(),
            )
    except Exception as e:
        raise SourceError(f"open_clip could not build '{source.name}' ({reason(e)}); is it up to date?") from e


def forward(model: Any, batch: Tensor) -> Any:
    return model.encode_image(batch)


def features(model: Any, batch: Tensor) -> Features:
    return Features(model.encode_image(batch))


LIBRARY = Library(forward, features)
