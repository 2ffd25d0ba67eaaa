"""Find out what kind of model or folder something is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import SourceError
from secateur.models.source import Source

FORMS = (
    "'timm/NAME', 'hf/ORG/NAME', 'open_clip/NAME:TAG', a local folder (saved by timm, transformers, open_clip or "
    "Secateur), a GGUF file, or an nn.Module"
)


def recognise(model: nn.Module) -> Source:
    """The Source of a module that was not loaded through Secateur."""
    from secateur.models import hf, open_clip, timm

    found = timm.recognise(model) or hf.recognise(model) or open_clip.recognise(model)
    return found or Source("module", type(model).__name__)


def folder_library(folder: Path) -> str:
    """Which library saved a folder, read from its config: "timm", "hf" or "open_clip".

    Raises:
        SourceError: the folder holds none of their configs, or a damaged one.
    """
    if (folder / "secateur.json").is_file():
        raise SourceError(f"'{folder}' was written by Secateur: open it with secateur.load or load_model")
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    file = folder / "config.json"
    if file.is_file():
        try:
            data: Any = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            raise SourceError(f"'{file}' is not valid JSON ({e}); copy it again") from e
        if not isinstance(data, dict):
            raise SourceError(f"'{file}' holds a {type(data).__name__}, expected an object; copy it again")
        if "architecture" in data:
            return "timm"
        if "model_type" in data:
            return "hf"
    raise SourceError(
        f"'{folder}' has neither secateur.json, open_clip_config.json nor a config.json of timm or transformers; "
        f"give {FORMS}"
    )
