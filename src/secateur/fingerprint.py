"""Which model a plan or a set of statistics belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn


def structure(model: nn.Module) -> str:
    """Hash of the names and shapes of all parameters and buffers."""
    text = "\n".join(f"{n}{tuple(t.shape)}" for n, t in sorted(model.state_dict().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(model: nn.Module, read: Callable[[str], Tensor] | None = None) -> dict[str, str]:
    """Hashes of a model's structure and of its weights (a thin sample of every tensor).

    Args:
        read: where to find the tensors that a model without weights (meta device) does not hold, by name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        flat = (read(name) if read is not None and tensor.is_meta else tensor).detach().reshape(-1)
        if flat.numel() and not flat.is_meta:
            sample = flat[:: max(1, flat.numel() // 16)][:32].to(torch.float64).cpu()
            digest.update(sample.contiguous().numpy().tobytes())
    return {"structure": structure(model), "weights": digest.hexdigest()[:16]}
