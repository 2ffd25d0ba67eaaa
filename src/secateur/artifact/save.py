"""Saving: one safetensors file and JSON beside it; the folder appears whole or not at all.

model.safetensors   the small weights (several files of a model that was cut piece by piece, see `weights`)
secateur.json       where the model came from, what its structure is, hashes, figures
plan.json           which units were kept
config.json         the source library's own configuration of the dense model (open_clip_config.json for open_clip)
tokenizer.json ...  of models that read text
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from secateur.artifact.about import About, to_json
from secateur.artifact.weights import SINGLE, storable
from secateur.errors import SecateurError, SecateurWarning, SourceError
from secateur.files import atomic_folder, sha256
from secateur.models import Source, skeleton, source_of
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

    folder, source, recipe = Path(folder), source_of(model), recipe_of(model)
    tensors, tied = storable(tensors_of(model, recipe.shapes))
    figures = json.loads(to_json(figures or {}))
    _warn_if_alone(model, source, recipe)
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / SINGLE, metadata={"format": "pt"})
        describe(model, temporary, tied, figures)
    return folder


def describe(model: nn.Module, folder: Path, tied: dict[str, str], figures: dict[str, Any]) -> None:
    """Write everything that goes beside the weights of a model into their folder.

    Args:
        model: with its structure, Source, recipe and plan; its weights are not looked at.
        folder: holds the weights.
        tied: names of tensors that share that of another name.
        figures: measurements, JSON-able.
    """
    source, plan, recipe = source_of(model), plan_of(model), recipe_of(model)
    if plan is not None:
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    for name, config in _library_config(source).items():
        (folder / name).write_text(to_json(config), encoding="utf-8")
    _write_tokenizer(source, folder)
    About(
        source=source,
        recipe=recipe.model_dump(),
        tied=tied,
        buffers=_computed_buffers(model, recipe.shapes),
        sha256={file.name: sha256(file) for file in sorted(folder.iterdir())},
        figures=figures,
    ).write(folder)


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


def tensors_of(model: nn.Module, sliced: Iterable[str], within: str = "") -> dict[str, Any]:
    """What has to be saved of a model, or of one module of it: its state, and those buffers that the library would
    compute by itself at their dense size.

    Args:
        sliced: names of everything that was cut.
        within: dotted path of the module; the whole model by default.
    """
    prefix = f"{within}." if within else ""
    state: dict[str, Any] = {f"{prefix}{n}": t for n, t in model.get_submodule(within).state_dict().items()}
    state |= {n: get_tensor(model, n).detach() for n in sliced if n not in state and n.startswith(prefix)}
    return state


def _computed_buffers(model: nn.Module, sliced: Iterable[str]) -> dict[str, str]:
    """Types of the floating-point buffers that are not saved, since the library computes them by itself."""
    state = set(model.state_dict()) | set(sliced)
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
        differs = _difference(model, recipe.apply_(skeleton(source)))
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


def _difference(model: nn.Module, skeleton: nn.Module) -> str:
    mine, other = ({n: list(t.shape) for n, t in m.state_dict().items()} for m in (model, skeleton))
    for name in sorted(mine.keys() | other.keys()):
        if mine.get(name) != other.get(name):
            return f"'{name}' is {mine.get(name, 'not there')}, rebuilt {other.get(name, 'not there')}"
    return ""
