"""Data: folders, files, datasets and tensors of images, and text, as batches."""

from __future__ import annotations

import random
from typing import Any

from secateur.data.images import find_images, labelled_folder
from secateur.data.items import items_of
from secateur.data.reading import Batches
from secateur.data.text import windows
from secateur.errors import DataError
from secateur.models.source import ImageSpec, TextSpec

__all__ = ["Batches", "batches", "find_images", "labelled_folder", "windows"]

IMAGE_SIZE, TEXT_SIZE = 16, 4


def batches(
    data: Any,
    spec: ImageSpec | TextSpec,
    *,
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    broken: float = 0.1,
    window: int = 256,
    stride: int | None = None,
) -> Batches:
    """Batches from whatever holds images, or text for models that read text.

    Labels come along where the data have them (subfolders, a dataset's classes, pairs) and are used only by what asks
    for labels: the loss "cross-entropy" and kNN.

    Args:
        data: a folder, whose subfolders are classes if all its images lie in two or more of them; a file; a list of
            files, PIL images or 8-bit NumPy arrays [H, W, 3]; a Hugging Face dataset with an image column; a tensor
            [N, C, H, W] that is already normalised; or anything that yields such images or tensors, alone, with
            labels or in dicts, as a DataLoader does: that is read once, as far as `limit`, and kept. `Batches` are
            taken as they are.
            For text see `secateur.data.text.windows`: the items are then windows of token ids.
        spec: how the model wants what it reads.
        size: images (16 by default) or windows (4 by default) per batch.
        limit: use only so many: drawn at random with `seed`, or the first ones of what can only be iterated.
        broken: largest share of unreadable images, or lines of text, to put up with.
        window, stride: tokens of a window of text, and from the beginning of one to that of the next.

    Raises:
        DataError: nothing usable is there.
    """
    if isinstance(data, Batches):
        if limit is None or limit >= len(data.items):
            return data
        return data.pick(_draw(len(data.items), limit, seed))
    if limit is not None and limit < 1:
        raise DataError(f"limit is the number of images to use, at least 1, found {limit}")
    if isinstance(spec, TextSpec):
        text = windows(data, spec, window, stride, broken)
        out = Batches(text.items, spec, TEXT_SIZE if size is None else size, skipped=text.skipped, broken=broken)
    else:
        items, labels, classes = items_of(data, limit)
        out = Batches(items, spec, IMAGE_SIZE if size is None else size, labels, broken=broken, classes=classes)
    if limit is None or limit >= len(out.items):
        return out
    drawn = out.pick(_draw(len(out.items), limit, seed))
    drawn.skipped = out.skipped
    return drawn


def _draw(count: int, limit: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(count), limit))
