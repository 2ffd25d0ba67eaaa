"""Images to pixels to tensors, and where the files are.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from secateur.errors import DataError
from secateur.models.source import ImageSpec

_JPEG, _NETPBM = (".jpg", ".jpeg", ".jpe", ".jfif"), (".ppm", ".pgm", ".pbm", ".pnm")
SUFFIXES = frozenset((*_JPEG, ".png", ".apng", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".jp2", *_NETPBM))
_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}
_THIN = 8  # a picture that would be resized to more than so many crops in a row is cut to that first


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB: turned as its EXIF data say, 16-bit and floating-point values scaled, CMYK and
    palettes converted, transparency dropped, the first frame of an animation."""
    with suppress(Exception):  # broken EXIF data: the pixels are fine
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_bytes(np.asarray(image, dtype=np.float32)))
    if image.mode == "RGB":
        return image
    return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Values of 16 or 32 bits as 8: what they span (1, 255, 65535 or more) is read off the largest."""
    values = np.nan_to_num(values, posinf=0.0, neginf=0.0).clip(min=0)
    largest = float(values.max(initial=0))
    top = next((t for t in (1.0, 255.0, 65535.0) if largest <= t), largest)
    return (values * (255.0 / top)).round().astype(np.uint8)


def to_crop(image: Image.Image, spec: ImageSpec) -> np.ndarray:
    """Resize the shorter side and crop the centre: uint8 [H, W, C]."""
    image = to_rgb(image)
    if spec.channels == 1:
        image = image.convert("L")
    height, width = spec.size
    image = _shortened(image, height, width)
    scale = max(height / image.height, width / image.width) / spec.crop
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(resized, _RESAMPLING.get(spec.interpolation, Image.Resampling.BICUBIC))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def to_tensor(crop: np.ndarray, spec: ImageSpec) -> Tensor:
    """Scale a crop to [0, 1] and normalise it: float32 [C, H, W]."""
    x = torch.from_numpy(crop.astype(np.float32) / 255.0)
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    return ((x - mean) / std).permute(2, 0, 1).contiguous()


def _shortened(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of a very long or very tall picture, so that resizing one pixel row does not fill the memory."""
    longest = (
        _THIN * max(1, round(image.height * width / height)),
        _THIN * max(1, round(image.width * height / width)),
    )
    size = (min(image.width, longest[0]), min(image.height, longest[1]))
    if size == image.size:
        return image
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def find_images(folder: Path) -> list[Path]:
    """Image files under a folder, sorted, by suffix; links are followed, names that begin with a dot passed over.

    Raises:
        DataError: the folder is missing, unreadable or holds none.
    """
    try:
        if folder.is_file():
            return [folder]
        if not folder.is_dir():
            raise DataError(f"'{folder}' does not exist; give a folder of images")
        files = sorted(p for p in _walk(folder) if p.suffix.lower() in SUFFIXES)
    except OSError as e:
        raise DataError(f"'{e.filename or folder}' cannot be read ({e.strerror or e}); mend its permissions") from e
    if not files:
        raise DataError(f"'{folder}' holds no images (files ending in {', '.join(sorted(SUFFIXES))})")
    return files


def _walk(folder: Path) -> list[Path]:
    """Every file below a folder, each folder once, however links go round."""

    def fail(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    found: list[Path] = []
    for path, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(path)
        mark = here.stat()
        if (mark.st_dev, mark.st_ino) in seen:
            folders.clear()
            continue
        seen.add((mark.st_dev, mark.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [here / f for f in files if not f.startswith(".")]
    return found


def classes_of(folder: Path, files: list[Path]) -> list[str]:
    """Class names of a folder whose images all lie in two or more subfolders, one a class; empty otherwise."""
    parts = [file.relative_to(folder).parts for file in files] if folder.is_dir() else []
    names = sorted({p[0] for p in parts if len(p) > 1})
    return names if len(names) > 1 and all(len(p) > 1 for p in parts) else []


def labelled_folder(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, class indices and class names of a folder with one subfolder a class.

    Raises:
        DataError: there are no such subfolders.
    """
    files = find_images(folder)
    names = classes_of(folder, files)
    if not names:
        raise DataError(f"'{folder}' needs at least two subfolders, one a class, and all its images in them")
    return files, labels_of(folder, files, names), names


def labels_of(folder: Path, files: list[Path], names: list[str]) -> list[int]:
    """The class of every file: its topmost subfolder."""
    index = {name: i for i, name in enumerate(names)}
    return [index[file.relative_to(folder).parts[0]] for file in files]
