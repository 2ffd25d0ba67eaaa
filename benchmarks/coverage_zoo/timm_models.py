"""timm: of every family, the smallest model of each distinct layout."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZES = (96, 128, 160, 192, 224, 256, 384)
# Classes that say nothing about a layout.
_PLAIN = re.compile("ReLU|GELU|SiLU|Swish|Identity|Drop|Sigmoid|Tanh|Mish|Flatten|Act|Softmax|Hard")
LARGE = 40e6  # parameters above which a model is made shallower and narrower, where its arguments allow it
_SMALLER: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 192, "num_heads": 3},
    {"depth": 2},
    {"depths": (1, 1, 2, 1)},
    {"depths": (1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {"layers": (1, 1, 1, 1, 1)},
)


def family_of(module: str, name: str) -> str:
    """A family is a timm module and the letters (and version) that the model's name starts with."""
    word = re.match(r"[a-z]+(v\d+)?", name.split("_")[0])
    return f"{module}/{word.group(0) if word else name}"


def cases() -> list[dict[str, Any]]:
    """One case for every distinct set of module classes within a family, its smallest model."""
    import timm

    found: dict[tuple[str, frozenset[str]], tuple[int, str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(name)
            layout = frozenset(c for c in {type(m).__name__ for m in model.modules()} if not _PLAIN.search(c))
            size = sum(p.numel() for p in model.parameters())
            key = (family_of(module, name), layout)
            found[key] = min(found.get(key, (size, name)), (size, name))
    return [
        {"library": "timm", "family": family, "name": name, "params": size}
        for (family, _), (size, name) in found.items()
    ]


def build(case: dict[str, Any]) -> tuple[nn.Module, Tensor, str]:
    """The model, an input, and what was made smaller."""
    import timm

    name = case["name"]
    smaller = _smaller(name, case["params"]) if case["params"] > LARGE else []
    error: Exception | None = None
    for kwargs, size, image in itertools.product([*smaller, {}], SIZES, ("img_size", "")):
        try:
            model = timm.create_model(name, **kwargs, **({image: size} if image else {})).eval()
            channels = model.pretrained_cfg["input_size"][0]
            x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                model(x)
        except Exception as e:  # any refusal of the size: try the next
            error = e
            continue
        small = "".join(f", {k}={v}" for k, v in kwargs.items())
        return model, x, f"{size} px{small}"
    raise RuntimeError(f"{name} runs at none of the sizes: {error}")


def _smaller(name: str, params: int) -> list[dict[str, Any]]:
    """Arguments that make less than half the model of it; whether it then runs is not known yet."""
    import timm

    out = []
    for kwargs in _SMALLER:
        try:
            with torch.device("meta"):
                model = timm.create_model(name, **kwargs)
        except Exception:  # unknown argument, or one that does not fit the others
            continue
        if sum(p.numel() for p in model.parameters()) < params / 2:
            out.append(kwargs)
    return out


def caller(case: dict[str, Any]) -> Callable[[nn.Module, Any], Any]:
    """How to call the model of a case."""
    return lambda model, batch: model(batch)
