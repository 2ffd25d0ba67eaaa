"""Models of open_clip: `ViT-B-32` or `ViT-B-32:tag`, local folders; the image tower is what is seen and cut."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur._compat import ensure_torchvision
from secateur.errors import SourceError
from secateur.models.source import Features, ImageSpec, Library, Source, attach


def _open_clip():
    ensure_torchvision()
    try:
        import open_clip
    except ImportError as e:
        raise SourceError("open_clip is not installed: pip install 'secateur[vision]'") from e
    return open_clip


def load(name: str, *, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """An open_clip model by name; the part behind a colon is the tag of its pretrained weights.

    Args:
        weights: local checkpoint instead of a tag.
    """
    open_clip = _open_clip()
    architecture, _, tag = name.partition(":")
    config = open_clip.get_model_config(architecture)
    if config is None:
        close = [m for m in open_clip.list_models() if m.lower().startswith(architecture.lower()[:5])][:6]
        raise SourceError(f"open_clip has no model '{architecture}'; close names: {', '.join(close) or 'none'}")
    if pretrained and not (tag or weights):
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise SourceError(f"name the weights: 'open_clip/{architecture}:TAG' with one of {', '.join(tags) or 'none'}")
    try:
        model = open_clip.create_model(architecture, pretrained=weights or (tag if pretrained else None), **kwargs)
    except Exception as e:
        raise SourceError(
            f"could not load the weights of '{name}' ({type(e).__name__}: {str(e).splitlines()[0][:120]}); where no "
            "hub is reachable, pass a local file (weights=...) or a local folder"
        ) from e
    return attach(model.eval(), _source(model, name, config, weights))


def open_folder(folder: Path) -> nn.Module:
    """A folder with open_clip_config.json and weights."""
    open_clip = _open_clip()
    data = json.loads((folder / "open_clip_config.json").read_text())
    model = open_clip.create_model(f"local-dir:{folder}")
    return attach(model.eval(), _source(model, str(folder), data["model_cfg"], None))


def _source(model: Any, name: str, config: dict[str, Any], weights: str | None) -> Source:
    size = model.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    cfg = getattr(model.visual, "preprocess_cfg", {})
    image = ImageSpec(
        size,
        tuple(cfg.get("mean", (0.48145466, 0.4578275, 0.40821073))),
        tuple(cfg.get("std", (0.26862954, 0.26130258, 0.27577711))),
        1.0,
        cfg.get("interpolation", "bicubic"),
    )
    return Source("open_clip", name, json.loads(json.dumps(config)), image, weights)


def recognise(model: nn.Module) -> Source | None:
    return None  # open_clip models do not carry their config


def build(source: Source) -> nn.Module:
    """The dense skeleton, with random weights."""
    open_clip = _open_clip()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": source.config}))
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False)


def forward(model: Any, batch: Tensor) -> Any:
    return model.encode_image(batch)


def features(model: Any, batch: Tensor) -> Features:
    return Features(model.encode_image(batch))


LIBRARY = Library(forward, features)
