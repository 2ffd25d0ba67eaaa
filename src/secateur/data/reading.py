"""A list of images, or of windows of text, as batches: what cannot be read is skipped, counted and named.

Shapes: B batch, C channels, H height, W width, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from secateur.data.images import to_crop, to_tensor
from secateur.errors import DataError
from secateur.models.source import ImageSpec, TextSpec
from secateur.progress import track

_THREADS, _AHEAD = 4, 3  # batches being read while one is used
_MEMORY = 512 * 2**20  # bytes of decoded pixels that are kept for the next pass


@dataclass
class Batches:
    """A fixed list of images or windows of text, read in order, in batches; iterate as often as you like.

    Files are decoded in threads, and the pixels of the first few thousand are kept, so that further passes cost little.

    Attributes:
        items: paths, PIL images, 8-bit NumPy arrays [H, W] or [H, W, C], or tensors [C, H, W] that are already
            normalised, in the order in which they are read; for text, tensors [T] of token ids.
        spec: how to make tensors of them.
        size: items per batch.
        labels: class of every item, where known.
        skipped: name and reason of every item that could not be read, filled while reading, in the order of the items.
        broken: largest share of unreadable items to put up with.
        rank, world: this process takes batches rank, rank + world, ...
        classes: names of the classes, where known.
        seen: pixels, or why there are none, of items already read.
    """

    items: Sequence[Any]
    spec: ImageSpec | TextSpec
    size: int = 16
    labels: Sequence[int] | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    broken: float = 0.1
    rank: int = 0
    world: int = 1
    classes: Sequence[str] = ()
    seen: dict[int, np.ndarray | str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not len(self.items):
            raise DataError("no images were given; expected a folder, a list of files, a dataset or tensors")
        if self.size < 1:
            raise DataError(f"a batch holds at least one image, found batch size {self.size}")
        if isinstance(self.items[0], Tensor) or isinstance(self.spec, TextSpec):
            return
        if self.spec.channels not in (1, 3):
            raise DataError(f"the model wants {self.spec.channels} channels, image files give 1 or 3; give tensors")

    def __len__(self) -> int:
        return len(range(self.rank, -(-len(self.items) // self.size), self.world))

    def shard(self, rank: int, world: int) -> Batches:
        """The same batches, only every `world`-th of them."""
        return replace(self, rank=rank, world=world)

    def pick(self, indices: Sequence[int]) -> Batches:
        """Some of the images, in the order given."""
        return replace(
            self,
            items=[self.items[i] for i in indices] if isinstance(self.items, list) else Some(self.items, indices),
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            skipped={},
            seen={new: self.seen[old] for new, old in enumerate(indices) if old in self.seen},
        )

    def readable(self) -> Batches:
        """Those images that can be read, all having been tried; what was skipped is remembered.

        Raises:
            DataError: too many cannot be read.
        """
        for _ in track(self, "Reading images", len(self)):
            pass
        good = self.pick([i for i in range(len(self.items)) if not isinstance(self.seen.get(i), str)])
        good.skipped = self.skipped
        return good

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.labelled():
            yield images

    def labelled(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches [B, C, H, W] (or token ids [B, T]) with their labels [B]; unreadable items are left out of both.

        Raises:
            DataError: too many images cannot be read, or tensors differ in shape.
        """
        starts = range(0, len(self.items), self.size)[self.rank :: self.world]
        chunks = [range(s, min(s + self.size, len(self.items))) for s in starts]
        failed: set[int] = set()
        pool = ThreadPoolExecutor(max_workers=_THREADS)
        ahead: deque[list[Future[Tensor | str]]] = deque()
        try:
            for n in range(len(chunks)):
                while len(ahead) < _AHEAD and n + len(ahead) < len(chunks):
                    ahead.append([pool.submit(self._read, i) for i in chunks[n + len(ahead)]])
                read: dict[int, Tensor] = {}
                for i, future in zip(chunks[n], ahead.popleft(), strict=True):
                    result = future.result()
                    if isinstance(result, str):
                        failed.add(i)
                        self.skipped[self._name(i)] = result
                    else:
                        read[i] = result
                self._check_share(len(failed))
                if read:
                    labels = None if self.labels is None else torch.tensor([self.labels[i] for i in read])
                    yield self._stacked(read), labels
        finally:
            pool.shutdown(cancel_futures=True)

    def _name(self, index: int) -> str:
        item = self.items[index] if isinstance(self.items, (list, tuple)) else None
        return str(item) if isinstance(item, (str, Path)) else f"image {index}"

    def _read(self, index: int) -> Tensor | str:
        """The image, or why it cannot be read."""
        known = self.seen.get(index)
        found = self._decode(index) if known is None else known
        if isinstance(found, Tensor):
            return found
        if known is None and (isinstance(found, str) or (len(self.seen) + 1) * found.nbytes <= _MEMORY):
            self.seen[index] = found
        return found if isinstance(found, str) else to_tensor(found, self._images())

    def _images(self) -> ImageSpec:
        assert isinstance(self.spec, ImageSpec)
        return self.spec

    def _decode(self, index: int) -> Tensor | np.ndarray | str:
        try:
            item = self.items[index]
            if isinstance(item, Tensor):
                return item
            if isinstance(item, dict):  # an undecoded row of a dataset
                item = BytesIO(item["bytes"]) if item.get("bytes") else item["path"]
            if isinstance(item, np.ndarray):
                item = Image.fromarray(item)
            if isinstance(item, Image.Image):
                return to_crop(item, self._images())
            with Image.open(item) as image:
                return to_crop(image, self._images())
        except MemoryError:
            raise
        except Exception as e:  # decoders raise whatever comes to their mind on damaged files
            return _why(e)

    def _stacked(self, read: dict[int, Tensor]) -> Tensor:
        shapes = {tuple(t.shape): i for i, t in read.items()}
        if len(shapes) > 1:
            (one, i), (other, j) = list(shapes.items())[:2]
            raise DataError(f"tensors of one batch differ in shape: image {i} is {one}, image {j} is {other}")
        return torch.stack(list(read.values()))

    def _check_share(self, failed: int) -> None:
        """Only what is certain ends a pass early: so many have failed already that the whole list must fail."""
        total = len(self.items)
        if failed / total <= self.broken and failed < total:
            return
        names = "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[:3])
        names += "; ..." if len(self.skipped) > 3 else ""
        if failed == total:
            raise DataError(f"none of {total} images can be read ({names}); give other files")
        raise DataError(
            f"{failed} of {total} images cannot be read, at most {self.broken:.0%} may fail ({names}); remove them, or "
            "allow more with broken= (--broken)"
        )


class Some(Sequence[Any]):
    """Part of a sequence whose items are made when asked for."""

    def __init__(self, whole: Sequence[Any], indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.whole[self.indices[index]]

    @property
    def mark(self) -> str:
        return f"{getattr(self.whole, 'mark', '')}{self.indices}"


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a format that is not known"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def check_items(items: Iterable[Any]) -> None:
    """Refuse what no image can be made of, by its type, before anything runs.

    Raises:
        DataError: with the kinds that can be read.
    """
    for index, item in enumerate(items):
        if isinstance(item, Tensor):
            if item.dim() != 3 or not item.is_floating_point():
                kind = str(item.dtype).removeprefix("torch.")
                raise DataError(
                    f"image {index} is a tensor {list(item.shape)} of {kind}, expected normalised floating-point "
                    "[C, H, W]; for 8-bit pictures give PIL images or NumPy arrays [H, W, 3]"
                )
        elif isinstance(item, np.ndarray):
            fits = item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (1, 3, 4))
            if item.dtype != np.uint8 or not fits:
                raise DataError(
                    f"image {index} is a NumPy array {list(item.shape)} of {item.dtype}, expected uint8 [H, W] or "
                    "[H, W, 3]; give normalised values as tensors [C, H, W]"
                )
        elif not isinstance(item, (str, Path, Image.Image)) and not (isinstance(item, dict) and "path" in item):
            raise DataError(f"image {index} is a {type(item).__name__}; give files, PIL images, arrays or tensors")
