"""Whatever holds images becomes batches; what cannot be read is skipped, counted and named."""

import os
import random
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import picture, write_pictures
from secateur import data
from secateur.data import Batches, batches, find_images, labelled_folder
from secateur.data.images import to_crop, to_rgb, to_tensor
from secateur.errors import DataError
from secateur.models.source import ImageSpec

SPEC = ImageSpec(size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
RNG = np.random.default_rng(0)
PIXELS = np.array(picture(RNG, 50, 40))
IMAGE = Image.fromarray(PIXELS)


def everything(stream) -> torch.Tensor:
    return torch.cat(list(stream))


def reference() -> torch.Tensor:
    return to_tensor(to_crop(IMAGE, SPEC), SPEC)


# Pictures of every kind


def exif() -> Image.Exif:
    out = Image.Exif()
    out[274] = 6  # turned a quarter
    return out


def saved(image: Image.Image, kind: str, **options) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(BytesIO(buffer.getvalue()))


GREY = PIXELS[..., 0]
PALETTE = IMAGE.convert("P", palette=Image.Palette.ADAPTIVE)
FRAMES = {"save_all": True, "append_images": [IMAGE.transpose(Image.Transpose.ROTATE_180)]}
KINDS = {
    "16-bit": (lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"), GREY),
    "16-bit big-endian": (lambda: Image.frombytes("I;16B", (50, 40), (GREY.astype(">u2") * 257).tobytes()), GREY),
    "32-bit": (lambda: saved(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"), GREY),
    "float to 1": (lambda: saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), GREY),
    "float to 255": (lambda: saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), GREY),
    "grey": (lambda: saved(Image.fromarray(GREY), "PNG"), GREY),
    "grey with a transparent value": (lambda: saved(Image.fromarray(GREY), "PNG", transparency=5), GREY),
    "grey with alpha": (lambda: saved(Image.fromarray(GREY).convert("LA"), "PNG"), GREY),
    "CMYK": (lambda: saved(IMAGE.convert("CMYK"), "TIFF"), PIXELS),
    "alpha": (lambda: saved(IMAGE.convert("RGBA"), "PNG"), PIXELS),
    "palette": (lambda: saved(PALETTE, "PNG"), np.array(PALETTE.convert("RGB"))),
    "palette with transparency": (
        lambda: saved(PALETTE, "PNG", transparency=bytes(range(256))),
        np.array(PALETTE.convert("RGB")),
    ),
    "one bit": (
        lambda: saved(Image.fromarray(GREY > 128), "PNG"),
        (GREY > 128).astype(np.uint8) * 255,
    ),
    "animated GIF": (lambda: saved(IMAGE, "GIF", **FRAMES), None),
    "animated WebP": (lambda: saved(IMAGE, "WEBP", lossless=True, **FRAMES), PIXELS),
    "turned by EXIF": (lambda: saved(IMAGE, "PNG", exif=exif()), np.rot90(PIXELS, -1)),
    "broken EXIF": (lambda: saved(IMAGE, "JPEG", quality=95, exif=b"Exif\x00\x00MM\x00*garbage"), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_becomes_rgb(kind):
    make, wanted = KINDS[kind]
    found = np.array(to_rgb(make())).astype(int)
    lossy, wanted = wanted is None, PIXELS if wanted is None else wanted
    if wanted.ndim == 2:
        wanted = np.repeat(wanted[..., None], 3, 2)
    assert found.shape == wanted.shape
    error = np.abs(found - wanted.astype(int))
    assert error.mean() < 10 if lossy else error.max() <= 1


@pytest.mark.parametrize("size", [(1, 3000), (5000, 1), (1, 1), (2, 3)])
def test_thin_and_tiny_pictures(size):
    image = Image.new("RGB", size, (255, 0, 0))
    assert (to_crop(image, SPEC) == [255, 0, 0]).all()
    assert to_crop(image, SPEC).shape == (32, 32, 3)


def test_a_long_picture_does_not_fill_the_memory(monkeypatch):
    sizes = []
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a: sizes.append(size) or real(self, size, *a))
    to_crop(Image.new("RGB", (20_000, 2)), SPEC)
    assert max(sizes[0]) <= 10 * 32


def test_resize_crop_and_normalisation():
    spec = ImageSpec(size=(20, 30), crop=0.8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = to_tensor(to_crop(IMAGE, spec), spec)
    assert x.shape == (3, 20, 30)
    scale = max(20 / 40, 30 / 50) / 0.8
    whole = IMAGE.resize((round(50 * scale), round(40 * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 30) // 2, (whole.height - 20) // 2
    pixels = torch.tensor(np.array(whole)[top : top + 20, left : left + 30] / 255.0, dtype=torch.float32)
    wanted = (pixels - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    torch.testing.assert_close(x, wanted.permute(2, 0, 1))


def test_grey_models():
    spec = ImageSpec(size=(32, 32), channels=1, mean=(0.5,), std=(0.5,))
    assert to_tensor(to_crop(IMAGE, spec), spec).shape == (1, 32, 32)
    with pytest.raises(DataError, match="wants 4 channels"):
        batches([IMAGE], ImageSpec(channels=4))


def test_damaged_bytes_never_stop_a_pass():
    rng = random.Random(0)
    originals = []
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        buffer = BytesIO()
        IMAGE.save(buffer, kind)
        originals.append(buffer.getvalue())
    items = []
    for _ in range(150):
        raw = bytearray(rng.choice(originals))
        for _ in range(rng.choice([1, 3, 20])):
            raw[rng.randrange(min(len(raw), 400))] = rng.randrange(256)
        items.append({"bytes": bytes(raw[: rng.choice([len(raw), rng.randrange(len(raw))])]), "path": None})
    stream = Batches(items, SPEC, broken=1.0)
    read = everything(stream)
    assert read.isfinite().all()
    assert len(read) + len(stream.skipped) == len(items)
    assert 0 < len(stream.skipped) < len(items)
    assert all("\n" not in why and why for why in stream.skipped.values())


# Where they come from


def test_a_folder_is_read_in_order_and_again_the_same(photos):
    stream = batches(photos, SPEC, size=5)
    assert [p.name for p in stream.items] == [f"{i:03}.png" for i in range(24)]
    assert [len(b) for b in stream] == [5, 5, 5, 5, 4]
    assert len(stream) == 5
    torch.testing.assert_close(everything(stream), everything(stream), rtol=0, atol=0)
    one_by_one = torch.stack([to_tensor(to_crop(Image.open(p), SPEC), SPEC) for p in stream.items])
    torch.testing.assert_close(everything(stream), one_by_one, rtol=0, atol=0)


def test_a_second_pass_does_not_decode_again(photos, monkeypatch):
    stream = batches(photos, SPEC, size=5)
    first = everything(stream)
    monkeypatch.setattr("secateur.data.reading.to_crop", None)
    torch.testing.assert_close(everything(stream), first, rtol=0, atol=0)
    torch.testing.assert_close(everything(stream.pick([3, 1])), first[[3, 1]], rtol=0, atol=0)


def test_memory_is_bounded(photos, monkeypatch):
    monkeypatch.setattr("secateur.data.reading._MEMORY", 3 * 32 * 32 * 3)
    stream = batches(photos, SPEC)
    torch.testing.assert_close(everything(stream), everything(stream), rtol=0, atol=0)
    assert len(stream.seen) <= 3 + 4  # a thread may be on its way


def test_reading_is_ahead_by_no_more_than_a_few_batches(photos, monkeypatch):
    read = []
    real = Batches._decode
    monkeypatch.setattr(Batches, "_decode", lambda self, i: read.append(i) or real(self, i))
    iterator = iter(batches(photos, SPEC, size=2))
    next(iterator)
    iterator.close()
    assert len(read) <= 6
    assert threading.active_count() < 10


def test_shards_take_turns(photos):
    stream = batches(photos, SPEC, size=5)
    parts = [list(stream.shard(rank, 2)) for rank in range(2)]
    assert [len(stream.shard(rank, 2)) for rank in range(2)] == [3, 2]
    torch.testing.assert_close(torch.cat([parts[0][0], parts[1][0], parts[0][1]]), everything(stream)[:15])


def test_limit_draws_with_the_seed(photos):
    names = [[p.name for p in batches(photos, SPEC, limit=6, seed=s).items] for s in (0, 0, 1)]
    assert names[0] == names[1] == sorted(names[0])
    assert names[0] != names[2]
    stream = batches(photos, SPEC)
    assert batches(stream, SPEC) is stream
    assert [p.name for p in batches(stream, SPEC, limit=6, seed=1).items] == names[2]
    with pytest.raises(DataError, match="at least 1"):
        batches(photos, SPEC, limit=0)


def test_subfolders_links_and_hidden_files(tmp_path):
    write_pictures(tmp_path / "b" / "c", 1)
    write_pictures(tmp_path / ".thumbnails", 1)
    picture(RNG).save(tmp_path / "A.JPG", "JPEG")
    (tmp_path / "._A.JPG").write_bytes(b"AppleDouble")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "round").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(write_pictures(tmp_path.parent / "elsewhere", 1))
    assert [str(p.relative_to(tmp_path)) for p in find_images(tmp_path)] == ["A.JPG", "b/c/000.png", "z/000.png"]


def test_classes_are_the_topmost_subfolders(classes_folder, tmp_path):
    stream = batches(classes_folder / "train", SPEC)
    assert (stream.labels, stream.classes) == ([0] * 4 + [1] * 4 + [2] * 4, ["a", "b", "c"])
    (images, labels), *_ = stream.labelled()
    assert len(images) == len(labels) == 12
    for name in ("cat", "dog"):  # with a folder between, as Tiny ImageNet has it
        write_pictures(tmp_path / name / "images", 2)
    assert batches(tmp_path, SPEC).labels == [0, 0, 1, 1]
    write_pictures(tmp_path / "empty" / "images", 0)
    assert labelled_folder(tmp_path)[2] == ["cat", "dog"]
    picture(RNG).save(tmp_path / "stray.png")
    assert batches(tmp_path, SPEC).labels is None
    with pytest.raises(DataError, match="one a class"):
        labelled_folder(tmp_path)


def test_labels_stay_with_their_images(classes_folder):
    stream = batches(classes_folder / "train", SPEC, size=5)
    some = stream.pick([11, 0, 5])
    assert list(some.labels) == [2, 0, 1]
    assert some.items[0] == stream.items[11]
    (tmp := dict(enumerate(stream.items)))[0] = Path("gone.png")
    (_, labels), *_ = Batches(list(tmp.values()), SPEC, 5, stream.labels).labelled()
    assert labels.tolist() == [0, 0, 0, 1]


def test_a_file_and_a_list_of_files(photos):
    files = [photos / "003.png", str(photos / "001.png")]
    torch.testing.assert_close(everything(batches(files, SPEC)), everything(batches(photos, SPEC))[[3, 1]])
    assert len(batches(photos / "003.png", SPEC).items) == 1
    assert batches([(photos / "003.png", 4), (photos / "001.png", 2)], SPEC).labels == [4, 2]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (x, 3), lambda x: {"image": x, "label": 3}])
@pytest.mark.parametrize("image", [IMAGE, PIXELS, torch.zeros(3, 32, 32)], ids=["PIL", "NumPy", "tensor"])
def test_images_in_memory(image, wrap):
    stream = batches([wrap(image)] * 3, SPEC)
    wanted = image if isinstance(image, torch.Tensor) else reference()
    torch.testing.assert_close(everything(stream), torch.stack([wanted] * 3))
    assert stream.labels in (None, [3, 3, 3])
    assert (stream.labels is None) == (wrap(0) in (0, [0]))


def test_arrays_and_tensors_of_many():
    torch.testing.assert_close(everything(batches(np.stack([PIXELS] * 2), SPEC)), torch.stack([reference()] * 2))
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(everything(batches(x, SPEC, size=2)), x)
    assert torch.equal(everything(batches([x[:2], x[2:]], SPEC)), x)
    assert batches([(x[:2], torch.tensor([1, 0])), (x[2:], torch.tensor([1, 1, 1]))], SPEC).labels == [1, 0, 1, 1, 1]


def test_a_data_loader_is_read_once_and_no_further_than_needed():
    from torch.utils.data import DataLoader, Dataset

    class Counting(Dataset):
        read = 0

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            Counting.read += 1
            return torch.full((3, 4, 4), float(i)), i % 7

    stream = batches(DataLoader(Counting(), batch_size=8), SPEC, size=4, limit=20)
    assert Counting.read == 24
    assert [float(x[0, 0, 0]) for x in stream.items] == list(range(20))
    assert stream.labels == [i % 7 for i in range(20)]
    assert torch.equal(everything(stream), everything(stream))


def test_captions_boxes_and_one_hot_vectors_are_no_classes():
    x = torch.zeros(2, 3, 4, 4)
    for label in (["a cat", "a dog"], torch.zeros(2, 10), {"boxes": []}, None):
        assert batches([(x, label)], SPEC).labels is None
    assert batches([(IMAGE, "a cat"), (IMAGE, "a dog")], SPEC).labels is None


def test_hugging_face_datasets(photos):
    datasets = pytest.importorskip("datasets")
    files = sorted(str(p) for p in photos.iterdir())[:6]
    features = datasets.Features(
        {"id": datasets.Value("int32"), "img": datasets.Image(), "what": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"id": list(range(6)), "img": files, "what": [0, 1, 0, 1, 1, 0]}
    table = datasets.Dataset.from_dict(rows, features=features)
    wanted = everything(batches(files, SPEC))
    for version in (table, table.with_format("torch"), table.cast_column("img", datasets.Image(decode=False))):
        stream = batches(version, SPEC, size=4)
        assert torch.equal(everything(stream), wanted)
        assert (stream.labels, stream.classes) == ([0, 1, 0, 1, 1, 0], ("cat", "dog"))
        assert torch.equal(
            everything(batches(version, SPEC, limit=3)), wanted[sorted(random.Random(0).sample(range(6), 3))]
        )
    streamed = table.rename_column("img", "image").to_iterable_dataset()
    assert torch.equal(everything(batches(streamed, SPEC, limit=4)), wanted[:4])
    with pytest.raises(DataError, match=r"splits train.*dataset\['train'\]"):
        batches(datasets.DatasetDict({"train": table}), SPEC)
    with pytest.raises(DataError, match="no image column; its columns are id"):
        batches(table.select_columns(["id"]), SPEC)


def test_a_broken_row_of_a_dataset_is_skipped():
    datasets = pytest.importorskip("datasets")
    good = BytesIO()
    IMAGE.save(good, "PNG")
    rows = {"image": [{"bytes": good.getvalue(), "path": None}, {"bytes": b"no", "path": None}]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    stream = batches(table, SPEC, broken=0.5)
    assert len(everything(stream)) == 1
    assert list(stream.skipped) == ["image 1"]


# What cannot be read


@pytest.fixture
def mixed(tmp_path):
    """20 pictures; the first two are broken."""
    folder = write_pictures(tmp_path / "mixed", 20)
    (folder / "000.png").write_text("not an image")
    half = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(half[: len(half) // 2])
    return folder


def test_broken_images_are_skipped_counted_and_named(mixed):
    stream = batches(mixed, SPEC, size=3, broken=0.1)
    for _ in range(2):
        assert len(everything(stream)) == 18
        assert list(stream.skipped) == [str(mixed / "000.png"), str(mixed / "001.png")]
    assert stream.skipped[str(mixed / "000.png")] == "not an image, or of a format that is not known"
    good = stream.readable()
    assert [p.name for p in good.items] == [f"{i:03}.png" for i in range(2, 20)]
    assert list(good.skipped) == list(stream.skipped)


def test_too_many_are_an_error_that_names_some(mixed):
    stream = batches(mixed, SPEC, size=3, broken=0.09)
    with pytest.raises(
        DataError, match=r"2 of 20 images cannot be read, at most 9% may fail \(.*000.png: not an image"
    ):
        everything(stream)


def test_the_share_is_of_the_whole_list_from_the_first_batch_on(mixed):
    assert len(next(iter(batches(mixed, SPEC, size=2, broken=0.1)))) == 2  # the first batch is all broken


def test_skipping_does_not_depend_on_the_threads(mixed, monkeypatch):
    for i in (4, 9, 15):
        (mixed / f"{i:03}.png").write_text("no")
    real, gate = Batches._decode, threading.Event()

    def late(self, index):
        if index == 0:
            gate.wait(0.2)
        return real(self, index)

    monkeypatch.setattr(Batches, "_decode", late)
    stream = batches(mixed, SPEC, size=20, broken=0.5)
    everything(stream)
    assert [Path(p).stem for p in stream.skipped] == ["000", "001", "004", "009", "015"]


def test_the_same_broken_file_twice_counts_twice(mixed):
    files = [mixed / "000.png", mixed / "000.png", *([mixed / "005.png"] * 8)]
    with pytest.raises(DataError, match="2 of 10"):
        everything(batches(files, SPEC, broken=0.15))


def test_nothing_readable_is_an_error_whatever_the_share(mixed):
    with pytest.raises(DataError, match="none of 2 images can be read"):
        everything(batches([mixed / "000.png", mixed / "001.png"], SPEC, broken=1.0))
    with pytest.raises(DataError, match="none of 1 images can be read"):
        batches(["no-such-file.png"], SPEC, broken=1.0).readable()


def test_folders_that_hold_nothing(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist; give a folder"):
        batches(tmp_path / "none", SPEC)
    with pytest.raises(DataError, match=r"holds no images \(files ending in .apng"):
        batches(tmp_path, SPEC)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="holds no images"):
        batches(str(tmp_path), SPEC)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        batches(tmp_path, SPEC)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images were given"),
        (torch.zeros(3, 8, 8), r"expected a tensor \[N, C, H, W\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "of uint8, expected normalised floating-point"),
        ([torch.zeros(8, 8)], "expected normalised"),
        ([np.zeros((8, 8, 3), np.float32)], "of float32, expected uint8"),
        ([np.zeros((3, 8, 8), np.uint8)], r"array \[3, 8, 8\]"),
        (np.zeros((8, 8, 3), np.uint8)[None].astype(float), "expected uint8"),
        ([3], "image 0 is a int"),
        ([IMAGE, None], "image 1 is a NoneType"),
        (3, "cannot read images from a int"),
        ({"a": IMAGE}, "cannot read images from a dict"),
        ([{"picture": IMAGE}], "found a dict with picture; expected one of pixel_values, image"),
    ],
)
def test_what_is_no_image_is_refused_at_once(images, message):
    with pytest.raises(DataError, match=message):
        batches(images, SPEC)


def test_tensors_of_a_batch_must_agree():
    with pytest.raises(DataError, match=r"image 0 is \(3, 4, 4\), image 1 is \(3, 5, 5\)"):
        everything(batches([torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)], SPEC))


def test_batch_size():
    with pytest.raises(DataError, match="at least one image"):
        batches([IMAGE], SPEC, size=0)


def test_public_names():
    assert set(data.__all__) == {"Batches", "batches", "find_images", "labelled_folder", "windows"}
