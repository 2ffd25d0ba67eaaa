"""Saving: one safetensors file and JSON beside it; the folder appears whole or not at all.

model.safetensors   the small weights
secateur.json       where the model came from, what its structure is, hashes, figures
plan.json           which units were kept
config.json         the source library's own configuration of the dense model (open_clip_config.json for open_clip)
tokenizer.json ...  of models that read text
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifact.about import About, to_json
from secateur.errors import ArtifactError, SecateurError, SecateurWarning, SourceError
from secateur.files import atomic_folder, sha256
from secateur.models import Source, build, source_of
from secateur.models.text import tokenizer
from secateur.nn.params import get_tensor
from secateur.surgery import Recipe, plan_of, recipe_of


def save(model: nn.Module, folder: str | Path, *, figures: dict[str, Any] | None = None) -> Path:
    """Write a cut (or dense) model so that `load` gives it back bit-exactly in another process.

    Args:
        model: as `prune` or `load_model` gave it.
        folder: created whole; an older one written by Secateur is replaced.
        figures: measurements to keep with the model, JSON-able.

    Raises:
        ArtifactError: the folder exists and holds something else, cannot be written, or the disk is full; or the model
            holds what cannot be saved.
    """
    from safetensors.torch import save_file

    folder, source, plan, recipe = Path(folder), source_of(model), plan_of(model), recipe_of(model)
    tensors, tied = _tensors(model, list(recipe.shapes))
    figures = json.loads(to_json(figures or {}))
    _warn_if_alone(model, source, recipe)
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        if plan is not None:
            (temporary / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        for name, config in _library_config(source).items():
            (temporary / name).write_text(to_json(config), encoding="utf-8")
        _write_tokenizer(source, temporary)
        About(
            source=source,
            recipe=recipe.model_dump(),
            tied=tied,
            buffers=_computed_buffers(model, tensors),
            sha256={file.name: sha256(file) for file in sorted(temporary.iterdir())},
            figures=figures,
        ).write(temporary)
    return folder


def _library_config(source: Source) -> dict[str, dict[str, Any]]:
    if source.library == "open_clip" and source.config:
        preprocess = {"mean": source.image.mean, "std": source.image.std, "interpolation": source.image.interpolation}
        return {"open_clip_config.json": {"model_cfg": source.config, "preprocess_cfg": preprocess}}
    return {"config.json": source.config} if source.config else {}


def _write_tokenizer(source: Source, folder: Path) -> None:
    """The tokenizer goes with the model, where there is one."""
    if source.text is None or not source.text.tokenizer:
        return
    try:
        tokenizer(source.text).save_pretrained(folder)
    except SourceError as e:
        warnings.warn(f"the model is saved without its tokenizer: {e}", SecateurWarning, stacklevel=3)


def _tensors(model: nn.Module, sliced: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, each stored once, and the names that share one."""
    state: dict[str, Any] = dict(model.state_dict())
    # Buffers that are not persistent are rebuilt by the library at their dense size: keep those that were cut.
    state |= {name: get_tensor(model, name).detach() for name in sliced if name not in state}
    first: dict[tuple, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ArtifactError(f"'{name}' is a {type(tensor).__name__} and no dense tensor: it cannot be saved")
        if tensor.device.type == "meta":
            raise ArtifactError(f"'{name}' has no data (meta device); load the model's weights before saving")
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor.detach().cpu() if whole else tensor.detach().cpu().clone().contiguous()
    return tensors, tied


def _computed_buffers(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Types of the floating-point buffers that are not saved, since the library computes them by itself."""
    state = set(model.state_dict()) | set(tensors)
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in state and buffer.is_floating_point()
    }


def _warn_if_alone(model: nn.Module, source: Source, recipe: Recipe) -> None:
    """Say so if the folder will not be enough to load the model from."""
    if source.library == "module":
        return
    try:
        skeleton = recipe.apply_(_skeleton(source))
        differs = _difference(model, skeleton)
    except SourceError as e:
        differs = str(e)
    except SecateurError as e:
        differs = f"{e}; was it cut twice, or changed by hand?"
    if differs:
        warnings.warn(
            f"'{source.name}' cannot be rebuilt from its name and configuration ({differs}): to load it again, give "
            "the dense model as your code makes it, load(folder, model=...)",
            SecateurWarning,
            stacklevel=3,
        )


def _skeleton(source: Source) -> nn.Module:
    """Of the dense model, without data where its library can."""
    try:
        with torch.device("meta"):
            return build(source)
    except (SourceError, NotImplementedError, RuntimeError):  # constructors that compute with values, .item() and such
        return build(source)


def _difference(model: nn.Module, skeleton: nn.Module) -> str:
    mine, other = ({n: list(t.shape) for n, t in m.state_dict().items()} for m in (model, skeleton))
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            return f"'{name}' is {mine.get(name, 'not there')}, rebuilt {other.get(name, 'not there')}"
    return ""
