"""Data: folders, files, datasets and tensors, as batches."""

from __future__ import annotations

import random
from typing import Any

from secateur.data.images import find_images, labelled_folder
from secateur.data.items import items_of
from secateur.data.reading import Batches
from secateur.errors import DataError
from secateur.models.source import ImageSpec

__all__ = ["Batches", "batches", "find_images", "labelled_folder"]


def batches(
    data: Any, spec: ImageSpec, *, size: int = 16, limit: int | None = None, seed: int = 0, broken: float = 0.1
) -> Batches:
    """Batches from whatever holds images.

    Labels come along where the data have them (subfolders, a dataset's classes, pairs) and are used only by what asks
    for labels: the loss "cross-entropy" and kNN.

    Args:
        data: a folder, whose subfolders are classes if all its images lie in two or more of them; a file; a list of
            files, PIL images or 8-bit NumPy arrays [H, W, 3]; a Hugging Face dataset with an image column; a tensor
            [N, C, H, W] that is already normalised; or anything that yields such images or tensors, alone, with
            labels or in dicts, as a DataLoader does: that is read once, as far as `limit`, and kept. `Batches` are
            taken as they are.
        spec: how the model wants its images.
        size: images per batch.
        limit: use only so many: drawn at random with `seed`, or the first ones of what can only be iterated.
        broken: largest share of unreadable images to put up with.

    Raises:
        DataError: nothing usable is there.
    """
    if isinstance(data, Batches):
        if limit is None or limit >= len(data.items):
            return data
        return data.pick(_draw(len(data.items), limit, seed))
    if limit is not None and limit < 1:
        raise DataError(f"limit is the number of images to use, at least 1, found {limit}")
    items, labels, classes = items_of(data, limit)
    out = Batches(items, spec, size, labels, broken=broken, classes=classes)
    return out if limit is None or limit >= len(items) else out.pick(_draw(len(items), limit, seed))


def _draw(count: int, limit: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(count), limit))
