"""From whatever holds images to a list of them, with labels where the data have some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from secateur.data.images import classes_of, find_images, labels_of
from secateur.data.reading import check_items
from secateur.errors import DataError

Found = tuple[Sequence[Any], list[int] | None, Sequence[str]]
_IMAGES, _LABELS = ("pixel_values", "image", "images", "img"), ("label", "labels", "class", "target")


def items_of(data: Any, limit: int | None = None) -> Found:
    """Items, class indices and class names.

    Args:
        data: see `secateur.data.batches`.
        limit: stop reading what can only be iterated after so many.

    Raises:
        DataError: no images can be had from this.
    """
    if isinstance(data, (str, Path)):
        return _folder(Path(data))
    if isinstance(data, Tensor):
        if data.dim() != 4:
            raise DataError(f"expected a tensor [N, C, H, W], found shape {list(data.shape)}")
        check_items(data[:1])
        return list(data), None, ()
    if hasattr(data, "column_names"):
        return _dataset(data, limit)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DataError(
            f"cannot read images from a {type(data).__name__}; give a folder, a list of files, a dataset or tensors"
        )
    return _entries(data, limit)


def _folder(folder: Path) -> Found:
    files = find_images(folder)
    names = classes_of(folder, files)
    return files, labels_of(folder, files, names) if names else None, names


def _dataset(data: Any, limit: int | None) -> Found:
    """A Hugging Face dataset: its first image column, and its first column of classes if it has one."""
    if isinstance(data, Mapping):
        raise DataError(f"the dataset has splits {', '.join(map(str, data))}: give one, for example dataset['train']")
    kinds = {name: type(feature).__name__ for name, feature in (data.features or {}).items()}
    image = next((n for n, kind in kinds.items() if kind == "Image"), None)
    if not hasattr(data, "__len__"):  # streamed
        return _entries(data, limit)
    if image is None:
        raise DataError(f"the dataset has no image column; its columns are {', '.join(data.column_names)}")
    data = data.with_format(None)  # pictures, not tensors
    label = next((n for n, kind in kinds.items() if kind == "ClassLabel"), None)
    labels = [] if label is None else list(data[label])
    if not labels or any(v is None for v in labels):
        return _Column(data, image), None, ()
    return _Column(data, image), labels, tuple(data.features[label].names)


class _Column(Sequence[Any]):
    """Images of one column, decoded when asked for."""

    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name
        self.mark = f"{getattr(data, '_fingerprint', '')}:{name}"  # which data these are

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data[int(index)][self.name]


def _entries(data: Iterable[Any], limit: int | None) -> Found:
    """Images, or batches of them, alone, in pairs with labels, or in dicts."""
    pairs = list(islice(_pairs(data), limit))
    items = [image for image, _ in pairs]
    check_items(items)
    labels = [int(label) for _, label in pairs if _is_class(label)]
    return items, labels if labels and len(labels) == len(items) else None, ()


def _pairs(data: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for entry in data:
        image, label = _image_and_label(entry)
        if isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4:
            fits = isinstance(label, (Tensor, np.ndarray, list, tuple)) and len(label) == len(image)
            yield from zip(image, label if fits else [None] * len(image), strict=True)
        else:
            yield image, label


def _image_and_label(entry: Any) -> tuple[Any, Any]:
    if isinstance(entry, Mapping) and "path" not in entry:
        image = next((entry[k] for k in _IMAGES if k in entry), None)
        if image is None:
            raise DataError(f"found a dict with {', '.join(map(str, entry))}; expected one of {', '.join(_IMAGES)}")
        return image, next((entry[k] for k in _LABELS if k in entry), None)
    if isinstance(entry, (tuple, list)) and entry:
        return entry[0], entry[1] if len(entry) > 1 else None
    return entry, None


def _is_class(label: Any) -> bool:
    """One whole number; captions, boxes and one-hot vectors are not classes."""
    if isinstance(label, (Tensor, np.ndarray)):
        return np.asarray(label).size == 1
    return isinstance(label, (int, np.integer)) and not isinstance(label, bool)
