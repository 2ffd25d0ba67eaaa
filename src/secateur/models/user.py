"""A module of the user's own: called on the batch, its outputs taken as they come."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from secateur.errors import SourceError
from secateur.models.source import Features, ImageSpec, Library, Source, attach, source_of
from secateur.nn.trees import tensors_in


def take(model: nn.Module, *, image: ImageSpec | None = None) -> nn.Module:
    """A module as it is.

    Args:
        image: how it wants its images; by default what its library says, or 224 x 224 in the colours of ImageNet.
    """
    source = source_of(model)
    return model if image is None else attach(model, replace(source, image=image))


def forward(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def features(model: nn.Module, batch: Any) -> Features:
    """The first floating-point tensor that comes out: [B, D] as it is, tokens and maps averaged."""
    out = next((t for t in tensors_in(forward(model, batch)) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if out is None or out.dim() < 2:
        raise SourceError(f"{type(model).__name__} returns no tensor of shape [batch, ...] to take features from")
    if out.dim() == 2:
        return Features(out)
    tokens = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out.flatten(1, -2)
    return Features(tokens.mean(1), tokens)


def build(source: Source) -> nn.Module:
    raise SourceError(
        f"'{source.name}' is a module of your own: pass a freshly built one, load(folder, model=YourModule(...))"
    )


LIBRARY = Library(forward, features)
