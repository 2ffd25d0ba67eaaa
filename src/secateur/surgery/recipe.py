"""What a cut changed in a model's structure, as data: enough to rebuild the small skeleton without tracing anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import nn

from secateur.errors import ArtifactError
from secateur.nn.attention import HeadwiseAttention
from secateur.nn.localconfig import PREFIX, get_size, set_size
from secateur.nn.narrow import Narrowing, narrow_
from secateur.nn.params import get_tensor, owner_of, set_tensor, sync_attributes
from secateur.nn.reforward import reforward_
from secateur.nn.replacement import Structure, replacement
from secateur.nn.stack import Stack, remove_
from secateur.nn.stream import mix_, uncentre_


class BlockCut(BaseModel):
    """Blocks that were removed from one container.

    Attributes:
        stack: the container as it was, and what counts its blocks.
        keep: indices of the blocks that stay.
        replaced: what took the place of removed blocks, by index.
    """

    model_config = ConfigDict(extra="forbid")
    stack: Stack
    keep: list[int]
    replaced: dict[int, Structure] = Field(default_factory=dict)

    def apply_(self, model: nn.Module) -> Callable[[str], str | None]:
        """Remove them, in place; see `secateur.nn.stack.remove_`. Replacements are left to be filled."""
        return remove_(model, self.stack, self.keep, {i: replacement(s) for i, s in self.replaced.items()})


class Recipe(BaseModel):
    """Structural changes; blocks are removed first, all other names are those after that.

    Attributes:
        blocks: removed blocks, in the order in which they went, each in terms of the names then.
        shapes: new shape of every parameter and buffer that changed.
        attributes: [module, attribute, value] of every size attribute that changed.
        headwise: modules of class nn.MultiheadAttention that became HeadwiseAttention.
        rewritten: modules whose reshapes were freed of the input width, with their dense head counts.
        biases: names of biases that were added.
        rotated: kinds of groups that the model was prepared for by `rotate`.
        mixed: norms followed by a matrix since.
        uncentred: layer norms that no longer subtract the mean.
        narrowed: how attention modules were given head sizes of their own.
        eps: [module, attribute, value] of norms whose stream became narrower.
    """

    model_config = ConfigDict(extra="forbid")
    blocks: list[BlockCut] = Field(default_factory=list)
    shapes: dict[str, list[int]] = Field(default_factory=dict)
    attributes: list[tuple[str, str, int | list[int]]] = Field(default_factory=list)
    headwise: list[str] = Field(default_factory=list)
    rewritten: list[tuple[str, dict[str, int]]] = Field(default_factory=list)
    biases: list[str] = Field(default_factory=list)
    rotated: list[str] = Field(default_factory=list)
    mixed: list[str] = Field(default_factory=list)
    uncentred: list[str] = Field(default_factory=list)
    narrowed: list[Narrowing] = Field(default_factory=list)
    eps: list[tuple[str, str, FiniteFloat]] = Field(default_factory=list)

    def then(self, after: Recipe) -> Recipe:
        """Both changes in one, this one first."""
        data, more = self.model_dump(), after.model_dump()
        data["shapes"] |= more.pop("shapes")
        for name, values in more.items():
            # What the second sets anew, it sets for good.
            replaced = {tuple(v[:2]) for v in values} if name in ("attributes", "eps") else set()
            kept = [v for v in data[name] if v not in values and not (replaced and tuple(v[:2]) in replaced)]
            data[name] = [*kept, *values]
        return Recipe.model_validate(data)

    @classmethod
    def from_data(cls, data: Any, where: str) -> Recipe:
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            first = e.errors()[0]
            at = ".".join(str(x) for x in first["loc"])
            raise ArtifactError(f"{where} is damaged at '{at}': {first['msg']}") from e

    def without(self, cut: BlockCut, rename: Callable[[str], str | None]) -> Recipe:
        """The recipe with more blocks removed after all else."""

        def named(path: str) -> str:
            return rename(path) or ""

        return Recipe(
            blocks=[*self.blocks, cut],
            shapes={named(n): s for n, s in self.shapes.items() if rename(n) is not None},
            attributes=[(named(p), a, v) for p, a, v in self.attributes if rename(p) is not None],
            headwise=[named(p) for p in self.headwise if rename(p) is not None],
            rewritten=[(named(p), heads) for p, heads in self.rewritten if rename(p) is not None],
            biases=[named(n) for n in self.biases if rename(n) is not None],
            rotated=self.rotated,
            mixed=[named(p) for p in self.mixed if rename(p) is not None],
            uncentred=[named(p) for p in self.uncentred if rename(p) is not None],
            narrowed=[replace(n, module=named(n.module)) for n in self.narrowed if rename(n.module) is not None],
            eps=[(named(p), a, v) for p, a, v in self.eps if rename(p) is not None],
        )

    def apply_(self, model: nn.Module) -> nn.Module:
        """Give a dense skeleton the cut structure, in place; weights are left to be loaded.

        Raises:
            ArtifactError: the skeleton is not the one this recipe was written for.
        """
        try:
            for cut in self.blocks:
                cut.apply_(model)
            for path, heads in self.rewritten:
                if not reforward_(model.get_submodule(path), dict(heads)):
                    raise ArtifactError(
                        f"'{path}' cannot be rewritten; was its library upgraded since the model was cut?"
                    )
            for how in self.narrowed:
                if not narrow_(model, how):
                    raise ArtifactError(
                        f"'{how.module}' cannot be narrowed; was its library upgraded since the model was cut?"
                    )
            for path, attribute, value in self.attributes:
                module = model.get_submodule(path)
                old = get_size(module, attribute)
                _check_sizes(path, attribute, old)
                set_size(module, attribute, type(old)(value) if isinstance(value, list) else value)
            for path in self.headwise:
                attention = model.get_submodule(path)
                if type(attention) is not nn.MultiheadAttention:
                    raise ArtifactError(f"'{path}' is a {type(attention).__name__}, expected nn.MultiheadAttention")
                attention.__class__ = HeadwiseAttention
            for path in self.mixed:
                mix_(model.get_submodule(path))
            for path in self.uncentred:
                if not uncentre_(model.get_submodule(path)):
                    raise ArtifactError(f"'{path}' is a {type(model.get_submodule(path)).__name__}, expected LayerNorm")
            for path, attribute, eps in self.eps:
                if "eps" not in attribute or not isinstance(getattr(model.get_submodule(path), attribute), float):
                    raise ArtifactError(f"refusing to set '{path}.{attribute}': it is not a norm's epsilon")
                setattr(model.get_submodule(path), attribute, eps)
            for name, shape in self.shapes.items():
                old = get_tensor(model, name)
                set_tensor(model, name, old.new_zeros(shape))
            for name in self.biases:
                module, leaf = owner_of(model, name)
                weight = get_tensor(model, f"{name.rpartition('.')[0]}.weight")
                width = self.shapes.get(name, [self._outputs(module, weight.shape)])
                module.register_parameter(leaf, nn.Parameter(weight.new_zeros(width)))
            for path in dict.fromkeys(name.rpartition(".")[0] for name in self.shapes):
                sync_attributes(model.get_submodule(path))
        except (AttributeError, KeyError) as e:
            raise ArtifactError(f"the skeleton does not fit this model ({e}); was its library upgraded?") from e
        return model

    @staticmethod
    def _outputs(module: nn.Module, shape: Any) -> int:
        from secateur.nn.params import conv1d_like

        if getattr(module, "transposed", False):
            return shape[1] * module.groups
        return shape[1] if conv1d_like(module) else shape[0]


def _check_sizes(path: str, attribute: str, old: Any) -> None:
    """Only sizes may be set: integers, or lists of them."""
    plain = isinstance(old, int) or (isinstance(old, (list, tuple)) and all(isinstance(v, int) for v in old))
    if attribute.removeprefix(PREFIX).startswith("_") or isinstance(old, bool) or not plain:
        raise ArtifactError(f"refusing to set '{path}.{attribute}': it is not a size")
