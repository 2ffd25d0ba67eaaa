"""Models of transformers: by id or local folder, rebuilt from their config class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur._compat import ensure_torchvision
from secateur.errors import SourceError
from secateur.models.source import Features, ImageSpec, Library, Source, attach


def _transformers():
    ensure_torchvision()
    try:
        import transformers
    except ImportError as e:
        raise SourceError("transformers is not installed: pip install 'secateur[hf]'") from e
    return transformers


def load(name: str, *, pretrained: bool = True, weights: str | None = None, **kwargs: Any) -> nn.Module:
    """A transformers model by hub id or local folder, in the class that its config names.

    Args:
        pretrained: False builds it from its config with random weights.
        weights: not used by transformers; pass a folder instead.
    """
    transformers = _transformers()
    if weights is not None:
        raise SourceError("transformers models take no weights file; pass a folder with config.json and safetensors")
    try:
        config = transformers.AutoConfig.from_pretrained(name, **kwargs)
        cls = model_class(config)
        model = cls.from_pretrained(name, config=config, use_safetensors=True) if pretrained else cls(config)
    except Exception as e:
        raise SourceError(
            f"could not load '{name}' with transformers ({type(e).__name__}: {str(e).splitlines()[0][:160]}); where no "
            "hub is reachable, pass a local folder with config.json and model.safetensors"
        ) from e
    return attach(model.eval(), _source(model, name))


def model_class(config: Any) -> Any:
    """The class a config names as its architecture, else the base model of its type."""
    transformers = _transformers()
    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.MODEL_MAPPING[type(config)]


def _source(model: Any, name: str) -> Source:
    config = model.config
    data = config.to_dict()
    data["architectures"] = [type(model).__name__]
    return Source("hf", name, data, _image_spec(config, name))


def _image_spec(config: Any, name: str) -> ImageSpec:
    """Size from the config; mean, std and crop from the processor's file where there is one."""
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or 224
    if isinstance(size, dict):
        size = (size.get("height", 224), size.get("width", 224))
    size = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = getattr(vision, "num_channels", 3)
    mean, std, crop = (0.5,) * channels, (0.5,) * channels, 1.0
    file = Path(name) / "preprocessor_config.json"
    if file.is_file():
        import json

        data = json.loads(file.read_text())
        mean, std = tuple(data.get("image_mean", mean)), tuple(data.get("image_std", std))
        shortest = (data.get("size") or {}).get("shortest_edge") if isinstance(data.get("size"), dict) else None
        crop = min(1.0, size[0] / shortest) if shortest else 1.0
        crop_size = data.get("crop_size")
        if isinstance(crop_size, dict) and "height" in crop_size and data.get("do_center_crop", True):
            size = (crop_size["height"], crop_size["width"])
            crop = min(1.0, size[0] / shortest) if shortest else 1.0
    return ImageSpec(size, mean, std, crop, "bicubic", channels)


def recognise(model: nn.Module) -> Source | None:
    """The Source of a transformers model made elsewhere."""
    if not type(model).__module__.startswith("transformers.") or not hasattr(model, "config"):
        return None
    return _source(model, getattr(model, "name_or_path", "") or type(model).__name__)


def build(source: Source) -> nn.Module:
    """The dense skeleton, with random weights."""
    transformers = _transformers()
    data = dict(source.config)
    config = transformers.CONFIG_MAPPING[data["model_type"]].from_dict(data)
    return model_class(config)(config)


def forward(model: Any, batch: Tensor) -> Any:
    """The vision tower of a CLIP-like model, else the whole model."""
    if hasattr(model, "get_image_features"):
        return model.get_image_features(pixel_values=batch)
    return model(**{getattr(model, "main_input_name", "pixel_values"): batch})


def features(model: Any, batch: Tensor) -> Features:
    if hasattr(model, "get_image_features"):
        out = model.get_image_features(pixel_values=batch)
    else:
        name = getattr(model, "main_input_name", "pixel_values")
        headed = hasattr(model, "base_model") and model.base_model is not model
        out = model(**{name: batch}, **({"output_hidden_states": True} if headed else {}))
    if isinstance(out, Tensor):
        return Features(out.flatten(1))
    logits = getattr(out, "logits", None)
    logits = logits if isinstance(logits, Tensor) and logits.dim() == 2 else None
    tokens = getattr(out, "last_hidden_state", None)
    if tokens is None and getattr(out, "hidden_states", None):
        tokens = out.hidden_states[-1]
    pooled = getattr(out, "pooler_output", None)
    if tokens is None and pooled is None:
        return Features(next(t for t in out.values() if isinstance(t, Tensor)).flatten(1), logits=logits)
    if tokens is not None and tokens.dim() == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
        embedding = tokens.mean(1) if pooled is None else pooled.flatten(1)
        return Features(embedding, tokens, logits)
    if tokens is None:
        return Features(pooled.flatten(1), logits=logits)  # type: ignore[union-attr]
    prefix = _prefix_tokens(model)
    embedding = pooled if pooled is not None else (tokens[:, 0] if prefix else tokens.mean(1))
    return Features(embedding.flatten(1), tokens[:, prefix:], logits)


def _prefix_tokens(model: nn.Module) -> int:
    """CLS, distillation and register tokens, counted from the embedding module's parameters."""
    names = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    count = 0
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] in names:
            count += p.shape[1] if p.dim() == 3 else 1
    return count


LIBRARY = Library(forward, features)
