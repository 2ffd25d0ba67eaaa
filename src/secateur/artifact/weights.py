"""The weights of a saved model: one safetensors file, or several with an index of which holds what.

model.safetensors                                        of a model written at once
model-00001-of-00009.safetensors ...                     of one written piece by piece,
model.safetensors.index.json                             with the file of every tensor
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.artifact.about import About
from secateur.errors import ArtifactError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Shards:
    """Writes tensors into a folder, a file at a time, so that they need not all be in memory at once.

    Args:
        folder: an empty one; `finish` gives the files their names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[list[str]] = []
        self.bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one more file."""
        from safetensors.torch import save_file

        save_file(dict(tensors), self._part(len(self.parts)), metadata={"format": "pt"})
        self.parts.append(list(tensors))
        self.bytes += sum(t.nbytes for t in tensors.values())

    def finish(self) -> None:
        """Name the files and write the index."""
        where: dict[str, str] = {}
        for i, names in enumerate(self.parts):
            name = f"model-{i + 1:05}-of-{len(self.parts):05}.safetensors"
            self._part(i).rename(self.folder / name)
            where |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": where}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _part(self, index: int) -> Path:
        return self.folder / f"{index}.part.safetensors"


def storable(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, each stored once, and the names that share one.

    Raises:
        ArtifactError: something in it is no dense tensor, or has no data.
    """
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


def read_weights(folder: Path, about: About) -> dict[str, Tensor]:
    """All tensors of a saved model, mapped from their files: they take memory as they are used.

    Raises:
        ArtifactError: a file is missing, damaged or another one.
    """
    if INDEX not in about.sha256:
        return _read(about.check(folder, SINGLE))
    try:
        where = dict(json.loads(about.check(folder, INDEX).read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, LookupError, TypeError) as e:
        raise ArtifactError(f"'{folder / INDEX}' is no index of weights ({e}); copy the folder again") from e
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(where.values()):
        out |= _read(about.check(folder, str(name)))
    return out


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as e:
        raise ArtifactError(f"'{file}' is not readable ({e}); copy the folder again") from e
