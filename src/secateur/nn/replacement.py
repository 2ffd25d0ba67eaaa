"""A cheap module in the place of a run of blocks: a map of each token's stream by itself, x + f(x).

Shapes: B examples, T tokens, D width of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import AnatomyError
from secateur.nn.standin import Returns, answer, stream_of

HOWS = ("linear", "mlp")


@dataclass(frozen=True)
class Structure:
    """What a replacement is made from, as data.

    Attributes:
        how: "linear": x + W x + b; "mlp": W2 gelu(W1 norm(x) + b1) + b2 more, norm without parameters.
        width: D.
        returns: what it gives back, see `secateur.nn.standin`.
        attributes: plain attributes of the first block of the run, which the model's own code may read.
        layer: place in a cache of keys and values, if the blocks had one.
    """

    how: str
    width: int
    returns: Returns = None
    attributes: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    layer: int | None = None


class Replacement(nn.Module):
    """x + W x + b. Takes the stream out of whatever arguments a block gets, and returns what the block would.

    In a cache of keys and values it counts the tokens in its block's place, one number a token, since lengths are read
    off any layer.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        for name, value in structure.attributes.items():
            if name.startswith("_") or hasattr(self, name):
                raise AnatomyError(f"refusing to set '{name}' on a replaced block")
            setattr(self, name, value)
        self.returns, self.layer_idx = structure.returns, structure.layer
        self.add(structure.width)

    def add(self, width: int) -> None:
        """Make the layers."""
        self.linear = nn.Linear(width, width)

    def step(self, x: Tensor) -> Tensor:
        """What is added to the stream [..., D]."""
        return self.linear(x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = stream_of(args, kwargs)
        self._count(x, (*args, *kwargs.values()))
        return answer(self.returns, x + self.step(x), args, kwargs)

    def _count(self, x_BTD: Tensor, given: tuple[Any, ...]) -> None:
        cache = next((v for v in given if hasattr(v, "get_seq_length") and hasattr(v, "update")), None)
        cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder
        if cache is not None and self.layer_idx is not None:
            layers = getattr(cache, "layers", [])[self.layer_idx :]
            if layers and not hasattr(layers[0], "update"):
                return  # a layer that keeps a state, and no keys to be counted
            nothing = x_BTD.new_zeros(x_BTD.shape[0], 1, x_BTD.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)


class MlpReplacement(Replacement):
    """x + W x + b + W2 gelu(W1 norm(x) + b1) + b2; begins without what W2 adds."""

    def add(self, width: int) -> None:
        super().add(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def step(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.fc2(F.gelu(self.fc1(F.layer_norm(x, x.shape[-1:]))))


def replacement(structure: Structure) -> Replacement:
    """The module of a structure, with weights as they are made.

    Raises:
        AnatomyError: no such kind, or attributes that are not plain.
    """
    if structure.how not in HOWS or structure.width < 1:
        raise AnatomyError(f"a run of blocks is replaced by {' or '.join(HOWS)}, found '{structure.how}'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (Replacement if structure.how == "linear" else MlpReplacement)(structure)


def plain_attributes(block: nn.Module) -> dict[str, bool | int | float | str | None]:
    """Public settings of a block that are plain data."""
    taken = set(dir(Replacement)) | {"training", "returns", "layer_idx", "linear", "fc1", "fc2"}
    plain = (bool, int, float, str, type(None))
    return {k: v for k, v in vars(block).items() if isinstance(v, plain) and not k.startswith("_") and k not in taken}
