"""Norms over the residual stream: what they scale by, and forms of them that let the stream be rotated and sliced.

A norm that only divides by the root mean square commutes with rotations of the stream; its weights do not, and neither
does a subtracted mean. Hence weights are folded into what reads the norm, the mean into what writes the stream
(`UncentredLayerNorm` no longer subtracts it), and where the weights cannot be folded, since the reader is tied to the
embedding, they follow the norm as a matrix (`mix_`).

Shapes: D width of the stream.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.nn.params import get_tensor

MIX = "mix"


@dataclass(frozen=True)
class StreamNorm:
    """A norm over the residual stream: x / rms(x) * (slope * weight + offset) + bias.

    Attributes:
        module: dotted path.
        weight: name of its scale in the model.
        bias: name of its bias, or "".
        slope, offset: how the scale follows from the weight: 1 and 0, or 1 and 1 (Gemma).
        eps: attribute added to the mean square, or "".
        centred: it subtracts the mean first.
        readers: names of the weights that read what it gives.
    """

    module: str
    weight: str
    bias: str = ""
    slope: float = 1.0
    offset: float = 0.0
    eps: str = ""
    centred: bool = False
    readers: tuple[str, ...] = ()

    def scale(self, root: nn.Module) -> Tensor:
        """[D], float64: by what the normalised stream is multiplied."""
        return self.slope * get_tensor(root, self.weight).detach().double() + self.offset

    @torch.no_grad()
    def set_scale_(self, root: nn.Module, scale: Tensor | float) -> None:
        """Choose the weight so that the norm multiplies by `scale`."""
        weight = get_tensor(root, self.weight)
        value = (torch.as_tensor(scale, dtype=torch.float64, device=weight.device) - self.offset) / self.slope
        weight.copy_(value.expand(weight.shape))

    def narrow_(self, root: nn.Module, share: float) -> None:
        """Make up for a mean over fewer entries, the others having been zero.

        Args:
            share: of the stream's entries that are left.
        """
        module = root.get_submodule(self.module)
        self.set_scale_(root, self.scale(root) * share**-0.5)
        if self.eps:
            setattr(module, self.eps, getattr(module, self.eps) / share)


@dataclass(frozen=True)
class Stream:
    """What a residual stream passes through.

    Attributes:
        norms: over it.
        scales: pairs of a weight that writes into it and the parameter by which its output is multiplied (LayerScale).
    """

    norms: tuple[StreamNorm, ...] = ()
    scales: tuple[tuple[str, str], ...] = ()


def read_norm(root: nn.Module, path: str, size: int) -> StreamNorm | None:
    """What a module does to a stream of width `size`, found by trying; None if it is no norm that can be followed."""
    module = root.get_submodule(path)
    scales = [n for n, p in module.named_parameters() if p.shape == (size,) and "bias" not in n]
    biases = [n for n, p in module.named_parameters() if p.shape == (size,) and "bias" in n]
    others = [n for n, p in module.named_parameters() if p.shape != (size,) and n != MIX]
    if len(scales) != 1 or len(biases) > 1 or others or size % 2:
        return None
    probe = copy.deepcopy(module).to("cpu", torch.float64)
    if hasattr(probe, MIX):
        probe._parameters[MIX] = nn.Parameter(torch.eye(size, dtype=torch.float64))
    weight, x = probe.get_parameter(scales[0]), torch.ones(size, dtype=torch.float64)
    x[1::2] = -1
    with torch.no_grad():
        for name in biases:
            probe.get_parameter(name).zero_()
        seen = []
        for value in (0.0, 1.0):
            weight.fill_(value)
            seen.append(float((probe(x[None])[0] * x).mean()))
        offset, slope = float(round(seen[0])), float(round(seen[1] - seen[0]))
        if not slope:
            return None
        weight.fill_((1 - offset) / slope)
        trial = torch.linspace(-2, 3, size, dtype=torch.float64)[None]
        centred = torch.allclose(probe(trial), probe(trial + 2), atol=1e-3)
        rms = (trial - trial.mean() if centred else trial).square().mean().sqrt()
        expected = (trial - trial.mean() if centred else trial) / rms
        if not torch.allclose(probe(trial), expected, atol=1e-2) or not torch.allclose(
            probe(3 * trial), probe(trial), atol=1e-3
        ):
            return None
    eps = next((a for a, v in vars(module).items() if "eps" in a and isinstance(v, float)), "")
    prefix = f"{path}." if path else ""
    bias = prefix + biases[0] if biases else ""
    return StreamNorm(path, prefix + scales[0], bias, slope, offset, eps, centred)


class UncentredLayerNorm(nn.LayerNorm):
    """A layer norm of a stream that has no mean: the mean is not subtracted (again)."""

    def forward(self, input: Tensor) -> Tensor:
        out = F.rms_norm(input, self.normalized_shape, self.weight, self.eps)
        return out if self.bias is None else out + self.bias


def uncentre_(module: nn.Module) -> bool:
    """Change a layer norm's class to `UncentredLayerNorm`; False if it is not a plain one."""
    if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        module.__class__ = UncentredLayerNorm
    return isinstance(module, UncentredLayerNorm)


def mix_(module: nn.Module, matrix: Tensor | None = None) -> None:
    """Give a norm a subclass that multiplies what it gives by a matrix.

    Args:
        module: changed in place: its class, and a new parameter `mix` [D, D].
        matrix: its value; None leaves it zero, to be loaded.
    """
    cls = type(module)

    def forward(self, *args, **kwargs):
        return cls.forward(self, *args, **kwargs) @ self.mix

    weight = next(module.parameters())
    size = len(weight)
    value = weight.new_zeros(size, size) if matrix is None else matrix.to(weight)
    module.register_parameter(MIX, nn.Parameter(value, requires_grad=weight.requires_grad))
    module.__class__ = type(f"Mixed{cls.__name__}", (cls,), {"forward": forward})


def normalised(x: Tensor, centred: bool) -> Tensor:
    """The stream as a norm sees it before its weights: centred or not, divided by its root mean square."""
    x = x.detach().float()
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True).clamp_min(1e-12))
