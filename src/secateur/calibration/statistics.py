"""What calibration keeps: sums over all tokens of all images, per layer and per group; never the activations.

Shapes: N input features of a layer, P positions per image, U units of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.types import Anatomy
from secateur.calibration.stream import StreamSums
from secateur.calibration.weights import WeightSums
from secateur.errors import DataError
from secateur.tensorfile import read_tensors, write_tensors


@dataclass
class LayerSums:
    """Sums at the input of one consumer layer.

    Attributes:
        count: [], number of tokens seen (images x positions).
        total: [N], sum of h.
        square: [N], sum of h^2.
        absolute: [N], sum of |h|.
        weight: [], sum of the token weights (equal to `count` where tokens are not weighted).
        first: [N], weighted sum of h.
        outer: [N, N], weighted sum of h h^T; empty if covariances were not asked for.
        energy: [P], per position, sum of the squared gradient norm at the layer's output; empty without gradients or
            where images differ in size.
        share: [], sum over tokens of how large the layer's contribution is beside the stream that it is added to
            (squared norms, both centred as the next norm will see them); `count` where it writes into no stream.
    """

    count: Tensor
    total: Tensor
    square: Tensor
    absolute: Tensor
    weight: Tensor
    first: Tensor
    outer: Tensor
    energy: Tensor
    share: Tensor

    @classmethod
    def zeros(cls, n: int) -> LayerSums:
        """Empty sums for a layer with N inputs; `outer` and `energy` grow on first use."""
        one, vector = (lambda: torch.zeros(())), (lambda: torch.zeros(n))
        return cls(one(), vector(), vector(), vector(), one(), vector(), torch.empty(0), torch.empty(0), one())

    def add(self, name: str, value: Tensor) -> None:
        """Add to one of the sums in place, float32 on the CPU."""
        held: Tensor = getattr(self, name)
        value = value.detach().to(device="cpu", dtype=torch.float32)
        if held.numel() == 0:
            setattr(self, name, value.clone())
        elif held.shape == value.shape:
            held += value
        else:
            setattr(self, name, torch.full((1,), float("nan")))  # positions that differ between images have no mean

    @property
    def mean(self) -> Tensor:
        """[N], the weighted mean."""
        return self.first / self.weight.clamp_min(1e-12)

    @property
    def variance(self) -> Tensor:
        """[N], over tokens, unweighted."""
        mean = self.total / self.count
        return (self.square / self.count - mean**2).clamp_min(0)

    @property
    def second_moment(self) -> Tensor:
        """[N, N], weighted E[h h^T].

        Raises:
            DataError: covariances were not collected.
        """
        if self.outer.numel() == 0:
            raise DataError("these statistics hold no covariances; calibrate again with covariance=True")
        return self.outer / self.weight

    @property
    def covariance(self) -> Tensor:
        """[N, N], weighted and centred."""
        mean = self.mean.double()
        return self.second_moment.double() - mean[:, None] * mean

    @property
    def stream_share(self) -> float:
        """Mean share of the residual stream that the layer writes; 1 where it writes into none."""
        return float(self.share / self.count) if float(self.share) > 0 else 1.0

    @property
    def sensitivity(self) -> float | None:
        """Mean over tokens of the squared gradient norm at the layer's output; None if not collected."""
        if self.energy.numel() == 0 or not torch.isfinite(self.energy).all() or float(self.energy.sum()) <= 0:
            return None
        return float(self.energy.sum() / self.count)

    def position_weights(self, power: float = 0.5) -> Tensor | None:
        """[P], how much an error at each position matters to the model's features, with mean 1; None if unknown."""
        return position_weights(self.energy, power)


def position_weights(energy: Tensor, power: float) -> Tensor | None:
    if energy.numel() < 2 or not torch.isfinite(energy).all() or energy.sum() <= 0:
        return None
    weights = energy.clamp_min(1e-3 * float(energy.mean())) ** power
    return weights / weights.mean()


@dataclass
class TaylorSums:
    """Sums of activation x gradient of one loss, for the units of one group (all tensors [U]).

    Attributes:
        signed: over images, of the sum over tokens.
        sample: over images, of its absolute value.
        squared: over images, of its square.
        token: over images and tokens, of the absolute value.
    """

    signed: Tensor
    sample: Tensor
    squared: Tensor
    token: Tensor

    @classmethod
    def zeros(cls, units: int) -> TaylorSums:
        return cls(*(torch.zeros(units) for _ in fields(cls)))


@dataclass
class Statistics:
    """All sums of one calibration.

    Attributes:
        layers: by dotted path of the consumer layer.
        taylor: by loss, then by "<group>@<layer>".
        weights: by loss, then by "<group>@<weight>": weight x gradient sums, where they were asked for.
        joint: by loss, then by group: [U], the same added over a group's weights element by element (SDMPrune).
        projected: by "<group>@<layer>": [U], sum over tokens of the L1 norm of what a unit of several features (a head)
            adds to the layer's output; where it was asked for.
        stream: how much the residual stream turns from block to block; None if the model has no repeated blocks.
        moments: second moments by group name, for `secateur.rotate`; empty unless asked for.
        images: number of images (or windows of text) seen.
        skipped: name and reason of images that could not be read.
        meta: fingerprint of the model, token weighting, settings.
        model, anatomy: those of the calibration; not saved.
    """

    layers: dict[str, LayerSums] = field(default_factory=dict)
    taylor: dict[str, dict[str, TaylorSums]] = field(default_factory=dict)
    weights: dict[str, dict[str, WeightSums]] = field(default_factory=dict)
    joint: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    projected: dict[str, Tensor] = field(default_factory=dict)
    stream: StreamSums | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)
    images: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = field(default=None, repr=False)
    anatomy: Anatomy | None = field(default=None, repr=False)

    @property
    def losses(self) -> list[str]:
        return sorted(self.taylor)

    def tensors(self) -> dict[str, Tensor]:
        """Every sum by a flat name, in a fixed order."""
        out = {}
        for path, layer in self.layers.items():
            for f in fields(layer):
                out[f"layer|{path}|{f.name}"] = getattr(layer, f.name)
        for kind, held in (("taylor", self.taylor), ("weights", self.weights)):
            for loss, groups in held.items():
                for name, sums in groups.items():
                    out |= {f"{kind}|{loss}|{name}|{f.name}": getattr(sums, f.name) for f in fields(sums)}
        out |= {f"joint|{loss}|{name}": t for loss, groups in self.joint.items() for name, t in groups.items()}
        out |= {f"projected|{name}": t for name, t in self.projected.items()}
        if self.stream is not None:
            out |= {f"stream|{f.name}": getattr(self.stream, f.name) for f in fields(self.stream)}
        out |= {f"moment|{name}": value for name, value in self.moments.items()}
        return out

    def reduce_(self, add: Callable[[Tensor], None]) -> None:
        """Let every sum, and the image count, be added up over processes, in place."""
        count = torch.tensor([float(self.images)], dtype=torch.float64)
        add(count)
        self.images = round(float(count))
        for tensor in self.tensors().values():
            if tensor.numel():
                add(tensor)

    def save(self, path: str | Path) -> None:
        """Write safetensors with the meta data in its header; atomic."""
        header = {"images": self.images, "skipped": self.skipped, "meta": self.meta}
        write_tensors(path, "statistics", header, self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged, or not statistics.
        """
        return read_tensors(path, "statistics", cls._of, "calibrate again")

    @classmethod
    def _of(cls, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Statistics:
        out = cls(images=header["images"], skipped=header["skipped"], meta=header["meta"])
        layers: dict[str, dict[str, Tensor]] = {}
        taylor: dict[str, dict[str, dict[str, Tensor]]] = {}
        weights: dict[str, dict[str, dict[str, Tensor]]] = {}
        stream: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            kind, *rest = name.split("|")
            if kind == "layer":
                layers.setdefault(rest[0], {})[rest[1]] = tensor
            elif kind == "stream":
                stream[rest[0]] = tensor
            elif kind == "moment":
                out.moments[rest[0]] = tensor
            elif kind == "projected":
                out.projected[rest[0]] = tensor
            elif kind == "joint":
                out.joint.setdefault(rest[0], {})[rest[1]] = tensor
            else:
                held = {"taylor": taylor, "weights": weights}[kind]
                held.setdefault(rest[0], {}).setdefault(rest[1], {})[rest[2]] = tensor
        out.layers = {k: LayerSums(**v) for k, v in layers.items()}
        out.taylor = {k: {g: TaylorSums(**t) for g, t in v.items()} for k, v in taylor.items()}
        out.weights = {k: {g: WeightSums(**t) for g, t in v.items()} for k, v in weights.items()}
        out.stream = StreamSums(**stream) if stream else None
        return out
