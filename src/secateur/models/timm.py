"""Models of timm: by name, from a local folder in timm's own format, rebuilt from its config."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur._compat import ensure_torchvision
from secateur.errors import SourceError, reason
from secateur.models.hub import NO_HUB, library_call
from secateur.models.source import Features, ImageSpec, Library, Source, attach

# What `create_model` takes beside the architecture's own arguments: never taken from a file.
_FACTORY = frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"})


def _timm():
    ensure_torchvision()
    try:
        import timm
    except ImportError as e:
        raise SourceError(f"timm cannot be imported ({e}): pip install 'secateur[vision]'") from e
    return timm


def load(name: str, *, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """A timm model by name, with the library's pretrained weights or those of a local file.

    Args:
        name: as `timm.list_models()` gives it, with or without a tag.
        pretrained: False for random weights.
        weights: checkpoint in the original or timm's layout (.safetensors, .pt, .pth; read without unpickling code).
        kwargs: passed to `timm.create_model` (`img_size`, `num_classes`, ...).

    Raises:
        SourceError: no such model (the answer names close ones), or its weights cannot be had.
    """
    timm = _timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise SourceError(f"timm has no model '{name}'{_close(architecture, timm.list_models())}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise SourceError(f"timm has no weights '{tag}' for '{architecture}'; it has: {', '.join(tags[:8]) or 'none'}")
    if weights and not Path(weights).is_file():
        raise SourceError(f"weights file '{weights}' does not exist; give a .safetensors, .pt or .pth file")
    overlay: dict[str, Any] | None = {"file": str(weights)} if weights else None
    if overlay and kwargs.get("num_classes"):
        overlay["num_classes"] = kwargs["num_classes"]  # the file's too; timm would drop its classifier otherwise
    try:
        with library_call():
            model = timm.create_model(
                name, pretrained=pretrained or bool(weights), pretrained_cfg_overlay=overlay, **kwargs
            )
    except Exception as e:
        if weights:
            told = f"could not load '{weights}' into '{name}' ({reason(e)}); give a checkpoint of this very model"
        elif pretrained:
            told = f"could not load the weights of '{name}' ({reason(e)}); {NO_HUB} or a file (weights=..., --weights)"
        else:
            told = f"timm could not build '{name}' with {kwargs} ({reason(e)})"
        raise SourceError(told) from e
    return attach(model.eval(), _source(model, name, weights))


def _close(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.5)
    return f"; close names: {', '.join(close)}" if close else "; see timm.list_models()"


def open_folder(folder: str | Path, *, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """A model saved by timm (`config.json` with an architecture, and weights).

    Raises:
        SourceError: the folder is incomplete or damaged.
    """
    timm = _timm()
    if weights is not None:
        raise SourceError(f"'{folder}' has weights of its own; give a model name along with a weights file")
    try:
        with library_call():
            model = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **kwargs)
    except Exception as e:
        raise SourceError(
            f"timm could not open the folder '{folder}' ({reason(e)}); check what was asked for, or copy it again"
        ) from e
    return attach(model.eval(), _source(model, str(folder), None))


def _source(model: Any, name: str, weights: str | None) -> Source:
    given = getattr(model, "_model_args", {})
    args = {k: _plain(v) for k, v in given.items() if k not in _FACTORY and _is_plain(v)}
    if hasattr(model, "num_classes"):
        args["num_classes"] = model.num_classes  # as it is now, whatever it was built with
    cfg = model.pretrained_cfg
    config: dict[str, Any] = {
        "architecture": cfg.get("architecture") or name.partition(".")[0],
        "tag": cfg.get("tag") or "",
        "model_args": args,
    }
    if unsaved := sorted(k for k, v in given.items() if not _is_plain(v)):
        config["not_saved"] = unsaved
    return Source("timm", name, config, _image_spec(model), weights)


def _image_spec(model: Any) -> ImageSpec:
    from timm.data import resolve_data_config

    data = resolve_data_config(model=model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or data["input_size"][1:]  # as built
    size = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(model, "in_chans", None) or getattr(model, "_model_args", {}).get("in_chans")
    channels = int(channels or data["input_size"][0])
    mean, std = (_per_channel(data[k], channels) for k in ("mean", "std"))
    return ImageSpec(size, mean, std, data["crop_pct"] or 1.0, data["interpolation"], channels)


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """One value a channel; the average of the colours' where there are more or fewer."""
    values = tuple(float(v) for v in values)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None))) or (
        isinstance(value, (list, tuple)) and all(map(_is_plain, value))
    )


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def recognise(model: Any) -> Source | None:
    """The Source of a model that timm made elsewhere."""
    if not type(model).__module__.startswith("timm.") or not hasattr(model, "pretrained_cfg"):
        return None
    return _source(model, model.pretrained_cfg.get("architecture") or type(model).__name__, None)


def build(source: Source) -> nn.Module:
    """The dense skeleton, with random weights.

    Raises:
        SourceError: timm does not know the architecture, or it was built with arguments that cannot be saved.
    """
    timm = _timm()
    config = source.config
    architecture, tag, args = (config.get(k, d) for k, d in (("architecture", ""), ("tag", ""), ("model_args", {})))
    if config.get("not_saved"):
        raise SourceError(
            f"'{architecture}' was built with {', '.join(config['not_saved'])}=..., which cannot be saved: build the "
            "dense model again and give it, load(folder, model=...)"
        )
    if not isinstance(architecture, str) or not timm.is_model(architecture) or not isinstance(args, dict):
        raise SourceError(f"timm has no architecture '{architecture}'; is it up to date?")
    if odd := [k for k, v in args.items() if k in _FACTORY or not _is_plain(v)]:
        raise SourceError(f"refusing to pass '{odd[0]}' to timm: it is no argument of an architecture")
    name = f"{architecture}.{tag}" if tag and timm.list_pretrained(f"{architecture}.{tag}") else architecture
    try:
        return timm.create_model(name, pretrained=False, **args)
    except Exception as e:
        raise SourceError(f"timm could not build '{name}' with {args} ({reason(e)}); is it up to date?") from e


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
