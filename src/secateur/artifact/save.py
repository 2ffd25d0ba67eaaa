"""Saving: one safetensors file and JSON beside it; the folder appears whole or not at all.

model.safetensors   the small weights
secateur.json       where the model came from, what its structure is, hashes, figures
plan.json           which units were kept
config.json         the source library's own configuration (open_clip_config.json for open_clip)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.errors import ArtifactError
from secateur.files import atomic_folder
from secateur.models import source_of
from secateur.nn.params import get_tensor
from secateur.surgery import plan_of, recipe_of

FORMAT = 1


def save(model: nn.Module, folder: str | Path, *, figures: dict[str, Any] | None = None) -> Path:
    """Write a cut (or dense) model so that `load` gives it back bit-exactly in another process.

    Args:
        model: as `prune` or `load_model` gave it.
        folder: created whole; an older one written by Secateur is replaced.
        figures: measurements to keep with the model, JSON-able.

    Raises:
        ArtifactError: the folder exists and holds something else, cannot be written, or the disk is full.
    """
    from safetensors.torch import save_file

    folder, source, plan, recipe = Path(folder), source_of(model), plan_of(model), recipe_of(model)
    tensors, tied = _tensors(model, list(recipe.shapes))
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        about = {
            "format": FORMAT,
            "source": source.to_dict(),
            "recipe": recipe.model_dump(),
            "tied": tied,
            "sha256": {"model.safetensors": sha256(temporary / "model.safetensors")},
            "figures": figures or {},
        }
        (temporary / "secateur.json").write_text(json.dumps(about, indent=1))
        if plan is not None:
            (temporary / "plan.json").write_text(plan.to_json())
        name, config = _library_config(source.library, source.config, source.image)
        (temporary / name).write_text(json.dumps(config, indent=1))
    return folder


def _library_config(library: str, config: dict[str, Any], image: Any) -> tuple[str, dict[str, Any]]:
    if library == "open_clip":
        return "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {"mean": image.mean, "std": image.std}}
    return "config.json", config


def _tensors(model: nn.Module, sliced: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, each stored once, and the names that share one."""
    state = dict(model.state_dict())
    # Buffers that are not persistent are rebuilt by the library at their dense size: keep those that were cut.
    state |= {name: get_tensor(model, name).detach() for name in sliced if name not in state}
    first: dict[tuple, str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            raise ArtifactError(f"'{name}' has no data (meta device); load the model's weights before saving")
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, tied


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
