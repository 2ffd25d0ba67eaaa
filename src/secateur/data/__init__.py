"""Data: folders, files, datasets and tensors, as batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.images import Batches, find_images, labelled_folder
from secateur.errors import DataError
from secateur.models.source import ImageSpec

__all__ = ["Batches", "batches", "find_images", "labelled_folder"]


def batches(
    data: Any, spec: ImageSpec, *, size: int = 16, limit: int | None = None, seed: int = 0, broken: float = 0.1
) -> Batches:
    """Batches from whatever holds images.

    Args:
        data: a folder, a file, a list of files or PIL images, a Hugging Face dataset with an image column, a tensor
            [N, C, H, W] that is already normalised, or an iterable of such tensors (or of tuples that begin with one).
        spec: how the model wants its images.
        size: images per batch.
        limit: use only so many, drawn at random with `seed`.
        broken: largest share of unreadable images to put up with.

    Raises:
        DataError: nothing usable is there.
    """
    if isinstance(data, Batches):
        return data
    items, labels = _items(data)
    if not len(items):
        raise DataError("no images were given; expected a folder, a list of files, a dataset or tensors")
    if limit is not None and limit < len(items):
        chosen = sorted(random.Random(seed).sample(range(len(items)), limit))
        items = [items[i] for i in chosen]
        labels = None if labels is None else [labels[i] for i in chosen]
    return Batches(items, spec, size, labels, broken=broken)


def _items(data: Any) -> tuple[Sequence[Any], list[int] | None]:
    if isinstance(data, (str, Path)):
        folder = Path(data)
        files = find_images(folder)
        inside = {f.parent for f in files}
        if folder.is_dir() and len(inside) > 1 and all(p.parent == folder for p in inside):
            files, labels, _ = labelled_folder(folder)
            return files, labels
        return files, None
    if isinstance(data, Tensor):
        if data.dim() != 4:
            raise DataError(f"expected a tensor [N, C, H, W], found shape {list(data.shape)}")
        return list(data), None
    if hasattr(data, "column_names") and hasattr(data, "features"):
        return _dataset(data)
    if isinstance(data, Iterable):
        return _iterable(data)
    raise DataError(f"cannot read images from a {type(data).__name__}; give a folder, a list of files or tensors")


def _dataset(data: Any) -> tuple[Sequence[Any], list[int] | None]:
    """A Hugging Face dataset: the first image column, and a `label` column if there is one."""
    for name, feature in data.features.items():
        if type(feature).__name__ == "Image":
            labels = list(data["label"]) if "label" in data.column_names else None
            return _Column(data, name), labels
    raise DataError(f"the dataset has no image column; its columns are {', '.join(data.column_names)}")


class _Column(Sequence[Any]):
    """Rows of one column, decoded when asked for."""

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data[int(index)][self.name]


def _iterable(data: Iterable[Any]) -> tuple[Sequence[Any], list[int] | None]:
    items: list[Any] = []
    labels: list[int] = []
    for entry in data:
        image, label = (entry[0], entry[1]) if isinstance(entry, (tuple, list)) and len(entry) > 1 else (entry, None)
        if isinstance(image, Tensor) and image.dim() == 4:
            items.extend(image)
            if isinstance(label, Tensor):
                labels.extend(int(v) for v in label)
        else:
            items.append(image)
            if label is not None:
                labels.append(int(torch.as_tensor(label)))
    return items, labels if labels and len(labels) == len(items) else None
