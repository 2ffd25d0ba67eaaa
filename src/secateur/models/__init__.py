"""Loading: models of timm, transformers and open_clip, local folders, and modules of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import SourceError
from secateur.models.source import Features, ImageSpec, Source, attach, example_input, features, forward, source_of

__all__ = [
    "Features",
    "ImageSpec",
    "Source",
    "attach",
    "build",
    "example_input",
    "features",
    "forward",
    "open_source",
    "source_of",
]


def open_source(spec: str | Path | nn.Module, **kwargs: Any) -> nn.Module:
    """Load a dense model from one of the three libraries or a folder of theirs.

    Raises:
        SourceError: the form is unknown (the answer lists the valid ones) or the model cannot be had.
    """
    from secateur.models import hf, open_clip, timm
    from secateur.models.recognise import FORMS, folder_library

    if isinstance(spec, nn.Module):
        source_of(spec)
        return spec
    text = str(spec)
    if Path(text).is_dir():
        library = folder_library(Path(text))
        if library == "hf":
            return hf.load(text, **kwargs)
        return timm.open_folder(Path(text), **kwargs) if library == "timm" else open_clip.open_folder(Path(text))
    library, _, name = text.partition("/")
    loaders = {"timm": timm.load, "hf": hf.load, "open_clip": open_clip.load}
    if library not in loaders or not name:
        raise SourceError(f"'{text}' is neither a folder nor a known form; give {FORMS}")
    return loaders[library](name, **kwargs)


def build(source: Source) -> nn.Module:
    """The dense skeleton of a Source, with random weights, for saved weights to be put in."""
    from secateur.models import hf, open_clip, timm, user

    model = {"timm": timm, "hf": hf, "open_clip": open_clip, "module": user}[source.library].build(source)
    return attach(model.eval(), source)
