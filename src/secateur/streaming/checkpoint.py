"""The weights of a model on disk, read a few tensors at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from secateur.errors import SourceError, reason

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The safetensors files of a folder, and which of them holds what.

    Args:
        folder: with `model.safetensors`, or several files and their index.

    Raises:
        SourceError: there are none, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.sizes: dict[str, int] = {}
        self.dtypes: dict[str, str] = {}
        for file in self._listed():
            self._look(file)

    def _listed(self) -> list[Path]:
        index = self.folder / INDEX
        try:
            if index.is_file():
                where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return [self.folder / name for name in dict.fromkeys(where.values())]
        except (OSError, ValueError, LookupError, AttributeError) as e:
            raise SourceError(f"'{index}' is no index of weights ({reason(e)}); copy the folder again") from e
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise SourceError(
                f"'{self.folder}' holds no model.safetensors; a memory budget needs the weights in safetensors, as "
                "save_pretrained writes them"
            )
        return [single]

    def _look(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt") as held:
                for name in held.keys():  # noqa: SIM118
                    part = held.get_slice(name)
                    self.files[name], self.dtypes[name] = file, part.get_dtype()
        except (OSError, SafetensorError) as e:
            raise SourceError(f"'{file}' cannot be read ({reason(e)}); copy the folder again") from e

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @property
    def bytes(self) -> int:
        """Size of all files on disk."""
        return sum(file.stat().st_size for file in set(self.files.values()))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors mapped from their files: pages take memory as they are used, until the last tensor of the answer
        that lies in their file is gone. Writing to them never reaches the disk.

        Raises:
            SourceError: a file cannot be read any more.
        """
        from safetensors import SafetensorError, safe_open

        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        out: dict[str, Tensor] = {}
        for file, here in wanted.items():
            try:
                with safe_open(str(file), framework="pt") as held:
                    out |= {name: held.get_tensor(name) for name in here}
            except (OSError, SafetensorError) as e:
                raise SourceError(f"'{file}' cannot be read ({reason(e)}); copy the folder again") from e
        return out
