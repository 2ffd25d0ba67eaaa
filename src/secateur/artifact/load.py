"""Loading what `save` wrote, without unpickling anything: skeleton from the library, structure from the recipe, weights
from safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.artifact.about import NAME, About
from secateur.artifact.weights import read_weights
from secateur.errors import AnatomyError, ArtifactError, SourceError
from secateur.models import Source, attach, build, open_source, skeleton
from secateur.nn.params import owner_of
from secateur.plan import Plan
from secateur.surgery import Recipe, mark_as_cut


def load(folder: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Load a folder that Secateur wrote, in eval mode.

    Args:
        folder: written by `save`.
        model: a freshly built dense model, for models that no library can rebuild; it is cut and filled in place.

    Raises:
        ArtifactError: the folder is missing, damaged, or does not fit the installed library.
        SourceError: the skeleton cannot be built (library missing, or a module of your own that was not given).
    """
    folder = Path(folder)
    about = About.read(folder)
    recipe = Recipe.from_data(about.recipe, f"'{folder / NAME}'")
    plan = Plan.load(about.check(folder, "plan.json")) if "plan.json" in about.sha256 else None
    tensors = read_weights(folder, about)
    _check_names(recipe, tensors, about.tied, folder)
    source = _with_tokenizer(about.source, folder)

    def filled(dense: nn.Module) -> nn.Module:
        try:
            recipe.apply_(attach(dense, source).eval())
        except (AnatomyError, RuntimeError, ValueError, TypeError, ArithmeticError, IndexError) as e:
            raise ArtifactError(f"'{folder}' does not fit the skeleton ({e}); was its library upgraded?") from e
        _fill_(dense, tensors, about.tied, folder)
        return dense

    out = filled(skeleton(source) if model is None else model)
    if model is None and any(t.is_meta for t in (*out.parameters(), *out.buffers())):
        out = filled(build(source))  # some buffer is only made along with the weights
    for name, dtype in about.buffers.items():
        _retype_(out, name, dtype)
    if plan is not None or recipe.rotated:
        mark_as_cut(out, recipe, plan)
    return out


def load_model(spec: str | Path | nn.Module, **options: Any) -> nn.Module:
    """Load any model: `timm/NAME`, `hf/ORG/NAME`, `open_clip/NAME:TAG`, a local folder of one of them or of Secateur.

    Args:
        spec: what to load; an `nn.Module` is taken as it is.
        options: `pretrained=False` for random weights, `weights=FILE` for a local checkpoint, and whatever the library
            takes (`img_size=...` for timm); `image=ImageSpec(...)` for a module of your own.

    Raises:
        SourceError: the form is unknown, or the model cannot be had.
        ArtifactError: a folder that Secateur wrote is damaged.
    """
    if isinstance(spec, (str, Path)) and str(spec) and (Path(spec) / NAME).is_file():
        if options:
            raise SourceError(f"'{spec}' was written by Secateur and takes no {', '.join(options)}; leave it out")
        return load(spec)
    return open_source(spec, **options)


def _with_tokenizer(source: Source, folder: Path) -> Source:
    """The Source, with the tokenizer that lies beside the weights."""
    if source.text is None or not (folder / "tokenizer_config.json").is_file():
        return source
    return replace(source, text=replace(source.text, tokenizer=str(folder), gguf=""))


def _check_names(recipe: Recipe, tensors: dict[str, Tensor], tied: dict[str, str], folder: Path) -> None:
    """What the two files say about each other must agree before anything is built to their word."""
    for name, first in tied.items():
        if name in tensors or first not in tensors:
            raise ArtifactError(f"'{folder / NAME}' ties '{name}' to '{first}', which the weights do not bear out")
    for name, shape in recipe.shapes.items():
        saved = tensors.get(tied.get(name, name))
        if saved is None or list(saved.shape) != shape:
            found = "no such tensor" if saved is None else f"{list(saved.shape)}"
            raise ArtifactError(f"'{folder}' says that '{name}' is {shape}, its weights hold {found}; copy it again")
    if missing := [name for name in recipe.biases if tied.get(name, name) not in tensors]:
        raise ArtifactError(f"'{folder}' lacks the weights of '{missing[0]}'; copy it again")


def _fill_(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str], folder: Path) -> None:
    """Put tensors into a skeleton of the same structure, bit by bit."""
    if missing := sorted(set(model.state_dict()) - set(tensors) - set(tied)):
        raise ArtifactError(
            f"'{folder}' lacks {len(missing)} tensors of the model, first '{missing[0]}'; was the library upgraded "
            "since it was saved?"
        )
    made: dict[str, Tensor] = {}
    for name in [*tensors, *tied]:
        holder, leaf = _holder(model, name, folder)
        value, old = tensors[tied.get(name, name)], holder[leaf]
        if old is None or old.shape != value.shape:
            found = "nothing" if old is None else list(old.shape)
            raise ArtifactError(
                f"'{name}' is {list(value.shape)} in '{folder}' and {found} in the skeleton; was the library upgraded "
                "since it was saved?"
            )
        if name in tied and tied[name] in made:
            holder[leaf] = made[tied[name]]
        elif isinstance(old, nn.Parameter):
            holder[leaf] = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
        else:
            holder[leaf] = value
        made[name] = holder[leaf]


def _holder(model: nn.Module, name: str, folder: Path) -> tuple[dict[str, Any], str]:
    """The dict of parameters or buffers that holds a name."""
    try:
        module, leaf = owner_of(model, name)
        return next((d, leaf) for d in (module._parameters, module._buffers) if leaf in d)
    except (AttributeError, StopIteration) as e:
        raise ArtifactError(
            f"'{folder}' has a tensor '{name}' that the model does not know; was the library upgraded?"
        ) from e


def _retype_(model: nn.Module, name: str, dtype: str) -> None:
    """Give a computed buffer the floating-point type that it had."""
    try:
        module, leaf = owner_of(model, name)
        buffer, wanted = module._buffers[leaf], getattr(torch, dtype)
        module._buffers[leaf] = buffer if buffer is None else buffer.to(wanted)
    except (AttributeError, KeyError, TypeError) as e:
        raise ArtifactError(f"the model has no buffer '{name}' of type '{dtype}'; was its library upgraded?") from e
