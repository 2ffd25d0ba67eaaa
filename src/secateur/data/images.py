"""Image files to batches: what cannot be read is skipped, counted and named.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from secateur.errors import DataError
from secateur.models.source import ImageSpec

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"})
_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: 16-bit scaled, CMYK and palettes converted, the first frame of an animation."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).astype(np.uint8))
    return (
        image
        if image.mode == "RGB"
        else image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    )


def to_tensor(image: Image.Image, spec: ImageSpec) -> Tensor:
    """Resize the shorter side, crop the centre, scale to [0, 1], normalise: float32 [C, H, W]."""
    image = to_rgb(image)
    if spec.channels == 1:
        image = image.convert("L")
    height, width = spec.size
    scale = max(height / image.height, width / image.width) / spec.crop
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(resized, _RESAMPLING.get(spec.interpolation, Image.Resampling.BICUBIC))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    x = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)
    x = x[:, :, None] if x.dim() == 2 else x
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    return ((x - mean) / std).permute(2, 0, 1).contiguous()


@dataclass
class Batches:
    """A fixed list of images, read in order, in batches; iterate as often as you like.

    Attributes:
        items: paths, PIL images or tensors [C, H, W], in the order in which they are read.
        spec: how to make tensors of them.
        size: images per batch.
        labels: class of every item, where known.
        skipped: name and reason of every item that could not be read, filled while reading.
        broken: largest share of unreadable items to put up with.
        rank, world: this process takes batches rank, rank + world, ...
    """

    items: Sequence[Any]
    spec: ImageSpec
    size: int = 16
    labels: Sequence[int] | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    broken: float = 0.1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not len(self.items):
            raise DataError("no images were given; expected a folder, a list of files, a dataset or tensors")

    def __len__(self) -> int:
        return len(range(self.rank, -(-len(self.items) // self.size), self.world))

    def shard(self, rank: int, world: int) -> Batches:
        """The same batches, only every `world`-th of them."""
        return Batches(self.items, self.spec, self.size, self.labels, self.skipped, self.broken, rank, world)

    def __iter__(self) -> Iterator[Tensor]:
        for images, _ in self.labelled():
            yield images

    def labelled(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches [B, C, H, W] with their labels [B]; unreadable items are left out of both."""
        chunks = [range(i, min(i + self.size, len(self.items))) for i in range(0, len(self.items), self.size)]
        mine = chunks[self.rank :: self.world]
        with ThreadPoolExecutor(max_workers=4) as pool:
            ahead = [pool.submit(self._read_many, c) for c in mine[:2]]
            for n in range(len(mine)):
                if n + 2 < len(mine):
                    ahead.append(pool.submit(self._read_many, mine[n + 2]))
                indices, tensors = ahead.pop(0).result()
                self._check_share()
                if tensors:
                    labels = None if self.labels is None else torch.tensor([self.labels[i] for i in indices])
                    yield torch.stack(tensors), labels

    def _read_many(self, indices: Iterable[int]) -> tuple[list[int], list[Tensor]]:
        read = [(i, t) for i in indices if (t := self._read(i)) is not None]
        return [i for i, _ in read], [t for _, t in read]

    def _read(self, index: int) -> Tensor | None:
        item = self.items[index]
        if isinstance(item, Tensor):
            return item
        name = str(item) if isinstance(item, (str, Path)) else f"image {index}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns about odd EXIF data; the pixels are fine
                if isinstance(item, Image.Image):
                    return to_tensor(item, self.spec)
                with Image.open(item) as image:
                    return to_tensor(image, self.spec)
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as e:
            self.skipped[name] = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
            return None

    def _check_share(self) -> None:
        share = len(self.skipped) / len(self.items)
        if share > self.broken or len(self.skipped) == len(self.items):
            names = ", ".join(list(self.skipped)[:3])
            raise DataError(
                f"{len(self.skipped)} of {len(self.items)} images cannot be read (at most {self.broken:.0%} may fail): "
                f"{names}, ...; remove them or raise --broken"
            )


def find_images(folder: Path) -> list[Path]:
    """Image files under a folder, sorted, by suffix.

    Raises:
        DataError: the folder is missing, unreadable or holds none.
    """
    if not folder.exists():
        raise DataError(f"'{folder}' does not exist; give a folder of images")
    if folder.is_file():
        return [folder]
    try:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    except OSError as e:
        raise DataError(f"'{folder}' cannot be read: {e}") from e
    if not files:
        raise DataError(f"'{folder}' holds no images ({', '.join(sorted(SUFFIXES))})")
    return files


def labelled_folder(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, class indices and class names of a folder with one subfolder a class.

    Raises:
        DataError: there are no such subfolders.
    """
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    files, labels = [], []
    for index, name in enumerate(classes):
        for file in sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES):
            files.append(file)
            labels.append(index)
    if len(set(labels)) < 2:
        raise DataError(f"'{folder}' needs at least two subfolders with images, one a class; found {len(set(labels))}")
    return files, labels, classes
