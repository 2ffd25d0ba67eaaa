"""Loading: models of timm, transformers and open_clip, local folders, GGUF files, and modules of your own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import SourceError
from secateur.models.source import (
    Features,
    ImageSpec,
    Source,
    TextSpec,
    attach,
    example_input,
    features,
    forward,
    source_of,
)
from secateur.nn.weightless import empty_, unset_weights

__all__ = [
    "Features",
    "ImageSpec",
    "Source",
    "TextSpec",
    "attach",
    "build",
    "example_input",
    "features",
    "forward",
    "open_source",
    "skeleton",
    "source_of",
]


def open_source(spec: str | Path | nn.Module, **kwargs: Any) -> nn.Module:
    """Load a dense model from one of the three libraries or a folder of theirs, or take a module as it is.

    Raises:
        SourceError: the form is unknown (the answer lists the valid ones) or the model cannot be had.
    """
    from secateur.models import gguf, hf, open_clip, timm, user
    from secateur.models.recognise import FORMS, folder_library

    if isinstance(spec, nn.Module):
        return _call(user.take, spec, kwargs)
    if not isinstance(spec, (str, Path)):
        raise SourceError(f"cannot load a model from a {type(spec).__name__}; give {FORMS}")
    text = str(spec)
    if text.lower().endswith(".gguf") and Path(text).is_file():
        return _call(gguf.load, text, kwargs)
    if text and Path(text).is_dir():
        openers: dict[str, Callable[..., nn.Module]] = {
            "hf": hf.load,
            "timm": timm.open_folder,
            "open_clip": open_clip.open_folder,
        }
        return _call(openers[folder_library(Path(text))], text, kwargs)
    library, _, name = text.partition("/")
    loaders: dict[str, Callable[..., nn.Module]] = {"timm": timm.load, "hf": hf.load, "open_clip": open_clip.load}
    if library not in loaders or not name:
        raise SourceError(f"'{text}' is neither a folder nor a known form{_meant(text)}; give {FORMS}")
    return _call(loaders[library], name, kwargs)


def _meant(text: str) -> str:
    """A name that lacks only the library in front."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", text) or ("/" in text and Path(text).parent.exists()):
        return ""
    return f" (did you mean '{'hf' if '/' in text else 'timm'}/{text}'?)"


def _call(opener: Callable[..., nn.Module], what: Any, options: dict[str, Any]) -> nn.Module:
    try:
        inspect.signature(opener).bind(what, **options)
    except TypeError as e:
        name = type(what).__name__ if isinstance(what, nn.Module) else what
        raise SourceError(f"'{name}' cannot be loaded with {', '.join(options)} ({e}); leave it out") from e
    return opener(what, **options)


def build(source: Source) -> nn.Module:
    """The dense skeleton of a Source, with random weights, for saved weights to be put in.

    Raises:
        SourceError: its library cannot build it.
    """
    from secateur.models import hf, open_clip, timm, user

    libraries = {"timm": timm, "hf": hf, "open_clip": open_clip, "module": user}
    if source.library not in libraries:
        raise SourceError(f"library '{source.library}' is not known; upgrade Secateur")
    with torch.random.fork_rng(devices=[]):
        return attach(libraries[source.library].build(source).eval(), source)


def skeleton(source: Source) -> nn.Module:
    """As `build`, its parameters on the meta device, where they take no memory, if the library can do that.

    Raises:
        SourceError: its library cannot build it.
    """
    try:
        with unset_weights():
            return empty_(build(source))
    except (SourceError, NotImplementedError, RuntimeError):  # constructors that compute with values, .item() and such
        return build(source)
