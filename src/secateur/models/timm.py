"""Models of timm: by name, from a local folder in timm's own format, rebuilt from its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur._compat import ensure_torchvision
from secateur.errors import SourceError
from secateur.models.source import Features, ImageSpec, Library, Source, attach


def _timm():
    ensure_torchvision()
    try:
        import timm
    except ImportError as e:
        raise SourceError("timm is not installed: pip install 'secateur[vision]'") from e
    return timm


def load(name: str, *, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """A timm model by name, with the library's pretrained weights or those of a local file.

    Args:
        name: as `timm.list_models()` gives it, with or without a tag.
        weights: checkpoint in the original or timm's layout (.safetensors, .pt, .pth; read without unpickling code).
        kwargs: passed to `timm.create_model` (`img_size`, `num_classes`, ...).
    """
    timm = _timm()
    if not timm.is_model(name.split(".")[0]):
        close = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:6]
        raise SourceError(f"timm has no model '{name}'; close names: {', '.join(close) or 'none'}")
    overlay = {"file": str(weights)} if weights else None
    if weights and not Path(weights).is_file():
        raise SourceError(f"weights file '{weights}' does not exist")
    try:
        model = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    except Exception as e:
        what = weights or f"the pretrained weights of '{name}'"
        raise SourceError(
            f"could not load {what} ({type(e).__name__}: {str(e).splitlines()[0][:120]}); where no hub is reachable, "
            "pass a local file (weights=...) or a local folder"
        ) from e
    return attach(model.eval(), _source(model, name, kwargs, weights))


def open_folder(folder: Path, **kwargs: Any) -> nn.Module:
    """A model saved by timm (`config.json` with an architecture, and weights)."""
    timm = _timm()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)
    return attach(model.eval(), _source(model, str(folder), kwargs, None))


def _source(model: Any, name: str, kwargs: dict[str, Any], weights: str | None) -> Source:
    from timm.data import resolve_data_config

    data = resolve_data_config(model=model)
    channels, *size = data["input_size"]
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size  # as built, not as pretrained
    architecture = model.pretrained_cfg.get("architecture") or name.split(".")[0]
    args = {k: v for k, v in {**getattr(model, "_model_args", {}), **kwargs}.items() if _plain(v)}
    args.setdefault("num_classes", model.num_classes)
    return Source(
        library="timm",
        name=name,
        config={"architecture": architecture, "model_args": args},
        image=ImageSpec(
            tuple(size),
            tuple(data["mean"]),
            tuple(data["std"]),
            data["crop_pct"] or 1.0,
            data["interpolation"],
            channels,
        ),
        weights=weights,
    )


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None))) or (
        isinstance(value, (list, tuple)) and all(map(_plain, value))
    )


def recognise(model: Any) -> Source | None:
    """The Source of a model that timm made elsewhere."""
    if not type(model).__module__.startswith("timm.") or not hasattr(model, "pretrained_cfg"):
        return None
    return _source(model, model.pretrained_cfg.get("architecture") or type(model).__name__, {}, None)


def build(source: Source) -> nn.Module:
    """The dense skeleton, with random weights."""
    timm = _timm()
    return timm.create_model(source.config["architecture"], pretrained=False, **source.config["model_args"])


def forward(model: nn.Module, batch: Tensor) -> Any:
    return model(batch)


def features(model: Any, batch: Tensor) -> Features:
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        return Features(model(batch).flatten(1))
    tokens = model.forward_features(batch)
    if isinstance(tokens, (tuple, list)):
        tokens = tokens[-1]
    embedding = model.forward_head(tokens, pre_logits=True)
    logits = model.forward_head(tokens) if getattr(model, "num_classes", 0) > 0 else None
    if isinstance(embedding, (tuple, list)):
        embedding = embedding[0]
    patches = None
    if tokens.dim() == 3:
        patches = tokens[:, int(getattr(model, "num_prefix_tokens", 0) or 0) :]
    elif tokens.dim() == 4:
        last = getattr(model, "output_fmt", None) == "NHWC" or tokens.shape[-1] == getattr(model, "num_features", -1)
        patches = tokens.flatten(1, 2) if last else tokens.flatten(2).transpose(1, 2)
    return Features(embedding.flatten(1), patches, logits)


LIBRARY = Library(forward, features)
