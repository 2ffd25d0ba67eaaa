"""transformers: every vision class that the auto classes know, from its config class made narrow."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coverage_zoo.hf_special import LEFT_OUT, SPECIAL, Special
from secateur.models.hf import forward as image_forward

TASKS = (
    "IMAGE",
    "IMAGE_CLASSIFICATION",
    "BACKBONE",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION",
    "VIDEO_CLASSIFICATION",
    "IMAGE_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "MASKED_IMAGE_MODELING",
    "KEYPOINT_DETECTION",
    "IMAGE_TO_IMAGE",
)
# Widths are all divided by the same number, so that what must fit together still does.
_WIDTH = re.compile(
    r"hidden_size|hidden_dim|_dims?$|channels$|width$|d_model|d_latents|embed|intermediate|ffn|feedforward|filters"
    r"|feature_size|projection_size|pooler_output|n_embd|features$|^hidden_size|stage_\w+_channels|hidden_sizes"
)
_NOT_WIDTH = re.compile(r"^num_|heads|token|index|position|head_dim$|kernel|in_chans|key_dim|rope|layers$|_scale$")
LARGEST = 60e6  # parameters; more than this was not made small


def cases() -> list[dict[str, Any]]:
    """One case per class; the family is the model type."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for task in TASKS:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, kind)
    return [{"library": "hf", "family": kind, "name": name} for name, kind in found.items() if kind not in LEFT_OUT]


def build(case: dict[str, Any]) -> tuple[nn.Module, Any, str]:
    """The model, its input, and what was made smaller."""
    import transformers

    transformers.logging.set_verbosity_error()
    special = _special(case)
    cls = getattr(transformers, case["name"])
    error: Exception | None = None
    for divisor in special.divisors:
        for size in special.sizes:
            try:
                config = _config(case["family"], cls, divisor, size, special)
                with torch.device("meta"):
                    count = sum(p.numel() for p in cls(config).parameters())
                if count > LARGEST:
                    raise ValueError(f"{count / 1e6:.0f} million parameters, not small")
                torch.manual_seed(0)
                model = cls(config).eval()
                example = special.inputs(config, size)
                with torch.no_grad():
                    caller(case)(model, example)
            except Exception as e:  # any refusal: try the next
                error = error or e
                continue
            return model, example, f"{size} px" + (f", widths / {divisor}" if divisor > 1 else "")
    raise RuntimeError(f"{type(error).__name__}: {error}")


def caller(case: dict[str, Any]) -> Callable[[nn.Module, Any], Any]:
    """How to call the model of a case."""
    method = _special(case).method
    if method is None:
        return forward
    return lambda model, batch: getattr(model, method)(**batch)


def _special(case: dict[str, Any]) -> Special:
    return SPECIAL.get(case["name"]) or SPECIAL.get(case["family"], Special())


def _config(kind: str, cls: Any, divisor: int, size: int, special: Special) -> Any:
    import transformers

    config_class = getattr(cls, "config_class", None) or transformers.CONFIG_MAPPING[kind]
    data = _shrink(config_class(**special.config).to_dict(), divisor, size)
    data.update(special.then(size) if callable(special.then) else special.then)
    return config_class.from_dict(data)


def _shrink(data: dict[str, Any], divisor: int, size: int) -> dict[str, Any]:
    out = {}
    for key, value in data.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            value = _shrink(value, divisor, size)
            if key == "text_config":  # never run: only there to be counted
                value |= {k: 1 for k in ("num_hidden_layers", "encoder_layers") if k in value}
        elif key == "image_size":
            value = [size, size] if isinstance(value, (list, tuple)) else size
        elif key == "num_queries":
            value = min(value, 20)
        elif key == "vocab_size" and isinstance(value, int):
            value = min(value, 1000)
        elif key.endswith("token_id") and isinstance(value, int):
            value = min(value, 999)
        elif _WIDTH.search(key) and not _NOT_WIDTH.search(key):
            value = _divide(value, divisor)
        elif key in ("stage_names", "_out_features", "_out_indices"):
            continue
        out[key] = value
    return out


def _divide(value: Any, divisor: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_divide(v, divisor) for v in value]
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 16 and value % divisor == 0
    return value // divisor if whole else value


def forward(model: Any, batch: Any) -> Any:
    return image_forward(model, batch) if isinstance(batch, Tensor) else model(**batch)
