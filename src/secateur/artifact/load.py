"""Loading what `save` wrote, without unpickling anything: skeleton from the library, structure from the recipe, weights
from safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.artifact.save import FORMAT, sha256
from secateur.errors import ArtifactError
from secateur.models import Source, attach, build, open_source
from secateur.nn.params import get_tensor, owner_of
from secateur.plan import Plan
from secateur.surgery import Recipe, mark_as_cut


def load(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Load a folder that Secateur wrote, in eval mode.

    Args:
        folder: written by `save`.
        model: a freshly built dense skeleton, for models that are not from a library.

    Raises:
        ArtifactError: the folder is missing, damaged, or does not fit the installed library.
        SourceError: the skeleton cannot be built (library missing, or a module of your own that was not given).
    """
    folder = Path(folder)
    about = read_about(folder)
    try:
        source = Source.from_dict(about["source"])
    except (KeyError, TypeError) as e:
        raise ArtifactError(f"'{folder / 'secateur.json'}' does not say where the model came from ({e})") from e
    recipe = Recipe.from_data(about.get("recipe", {}), f"'{folder / 'secateur.json'}'")
    tensors = _read_weights(folder, about)
    if model is None:
        model = build(source)
    else:
        attach(model, source)
    recipe.apply_(model.eval())
    _fill_(model, tensors, about.get("tied", {}), folder)
    plan_file = folder / "plan.json"
    plan = Plan.load(plan_file) if plan_file.is_file() else Plan()
    mark_as_cut(model, recipe, plan)
    return model


def load_model(spec: str | Path | nn.Module, **options: Any) -> nn.Module:
    """Load any model: `timm/NAME`, `hf/ORG/NAME`, `open_clip/NAME:TAG`, a local folder of one of them or of Secateur.

    Args:
        spec: what to load; an `nn.Module` is taken as it is.
        options: `pretrained=False` for random weights, `weights=FILE` for a local checkpoint, and whatever the library
            takes (`img_size=...` for timm).

    Raises:
        SourceError: the form is unknown, or the model cannot be had.
    """
    if not isinstance(spec, nn.Module) and (Path(spec) / "secateur.json").is_file():
        return load(spec, **options)
    return open_source(spec, **options)


def read_about(folder: Path) -> dict[str, Any]:
    """The contents of secateur.json, checked.

    Raises:
        ArtifactError: missing, not JSON, or of a newer format.
    """
    file = folder / "secateur.json"
    if not file.is_file():
        raise ArtifactError(f"'{folder}' holds no secateur.json; give a folder that `secateur` wrote")
    try:
        about = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as e:
        raise ArtifactError(f"'{file}' is not valid JSON ({e}); copy the folder again") from e
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise ArtifactError(f"'{file}' has no format number; it was not written by Secateur")
    if about["format"] > FORMAT:
        raise ArtifactError(f"'{file}' has format {about['format']}, this Secateur reads up to {FORMAT}; upgrade it")
    return about


def _read_weights(folder: Path, about: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    expected = about.get("sha256", {}).get("model.safetensors")
    if not file.is_file():
        raise ArtifactError(f"'{file}' is missing; copy the folder again")
    if expected and sha256(file) != expected:
        raise ArtifactError(
            f"'{file}' is damaged or truncated (its sha256 is not the one in secateur.json); copy it again"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise ArtifactError(f"'{file}' is not readable ({e}); copy the folder again") from e


def _fill_(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str], folder: Path) -> None:
    """Put tensors into a skeleton of the same structure, bit by bit."""
    expected = set(model.state_dict())
    given = set(tensors) | set(tied)
    if missing := sorted(expected - given):
        raise ArtifactError(f"'{folder}' lacks {len(missing)} tensors of the model, first '{missing[0]}'")
    values = tensors | {name: tensors[first] for name, first in tied.items() if first in tensors}
    for name, value in values.items():
        try:
            old = get_tensor(model, name)
        except Exception as e:
            raise ArtifactError(f"'{folder}' has a tensor '{name}' that the model does not know") from e
        if old.shape != value.shape:
            raise ArtifactError(
                f"'{name}' is {list(value.shape)} in '{folder}' and {list(old.shape)} in the skeleton; was the library "
                "upgraded since the model was saved?"
            )
        module, leaf = owner_of(model, name)
        if leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=value.is_floating_point())
    for name, first in tied.items():
        module, leaf = owner_of(model, name)
        holder = module._buffers if leaf in module._buffers else module._parameters
        holder[leaf] = get_tensor(model, first)  # type: ignore[assignment]
