"""Writing files and folders so that a crash, a full disk or Ctrl-C never leaves half of one.

Everything is written under a temporary name beside its place, `.NAME.writing.XXXXXXXX`, and takes the place in one
step. A killed process leaves at most such a dot-name; the next write to the same place removes those that are older
than an hour.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import ArtifactError

STALE_SECONDS = 3600.0


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file there takes the place of `path` only if the block ends well.

    Raises:
        ArtifactError: the place cannot be written, or the disk is full.
    """
    place = _place(path)
    if place.is_dir():
        raise ArtifactError(f"'{path}' is a folder; give the name of a file")
    with _workshop(path, place) as folder:
        temporary = folder / place.name
        temporary.touch()
        mode = temporary.stat().st_mode  # the umask's; a library may put a file of its own in its place
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(place)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the place of `path` only if the block ends well.

    An existing folder is replaced only if Secateur wrote it (it holds a secateur.json) or it is empty.

    Raises:
        ArtifactError: the place cannot be written, holds something else, or the disk is full.
    """
    place = _place(path)
    with _workshop(path, place) as folder:
        _check_free(path)
        yield folder
        for file in folder.iterdir():
            file.chmod(folder.stat().st_mode & 0o666)
            _sync(file)
        _sync(folder)
        _swap(folder, place)


@contextmanager
def _workshop(path: Path, place: Path) -> Iterator[Path]:
    """A folder beside a place, gone at the end; what the system refuses meanwhile is explained."""
    folder = _beside(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place)
        folder.mkdir()
        yield folder
        _sync(place.parent)
    except Exception as e:
        _explain(e, path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path: Path, *, file: bool = False) -> None:
    """Find out before hours of work whether a folder (or a file) can be written at `path`; nothing is left there.

    Raises:
        ArtifactError: it cannot, or something else is there.
    """
    try:
        if not file:
            _check_free(path)
        elif path.is_dir():
            raise ArtifactError(f"'{path}' is a folder; give the name of a file")
        parent = _place(path).parent
        while not parent.exists():
            parent = parent.parent
        probe = _beside(parent / _place(path).name)
        probe.mkdir()
        probe.rmdir()
    except OSError as e:
        _explain(e, path)
        raise


def sha256(path: Path) -> str:
    """Of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(place: Path) -> None:
    """Remove what killed processes left beside a place more than an hour ago."""
    for left in place.parent.glob(f".{_escaped(place.name)}.writing.*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left)


def _place(path: Path) -> Path:
    """The real place, links followed, with a name even for '.'."""
    return Path(os.path.realpath(path))


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.writing.{secrets.token_hex(4)}")


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _check_free(path: Path) -> None:
    if path.is_dir() and ((path / "secateur.json").is_file() or not any(path.iterdir())):
        return
    if path.exists() or path.is_symlink():
        raise ArtifactError(f"'{path}' exists and was not written by Secateur; give another folder or remove it")


def _swap(new: Path, place: Path) -> None:
    """Put a folder in its place; an older one there is under the new one's name afterwards."""
    if not place.exists():
        new.rename(place)
    elif not _exchange(new, place):
        old = _beside(place)
        place.rename(old)
        try:
            new.rename(place)
        except BaseException:
            old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux): no moment without either."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _sync(path: Path) -> None:
    """Have the disk hold it, so that a power cut cannot leave an empty file under a final name."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: Exception, path: Path) -> None:
    """Raise an ArtifactError for what the system refused; any other error is left to be raised as it is."""
    text, code = getattr(error, "strerror", None) or str(error), getattr(error, "errno", None)
    if type(error).__name__ == "SafetensorError":  # it wraps the system's error in words
        found = re.search(r"os error (\d+)", text)
        if found is None:
            return
        code = int(found[1])
    elif not isinstance(error, OSError):
        return
    if code in (errno.ENOSPC, errno.EDQUOT):
        raise ArtifactError(f"the disk is full: '{path}' was not written; free some space and try again") from error
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise ArtifactError(f"no permission to write '{path}'; give a folder of your own") from error
    if code in (errno.ENOTDIR, errno.EEXIST):
        raise ArtifactError(f"'{path}' cannot be made, a file is in the way: {text}; give another place") from error
    raise ArtifactError(f"could not write '{path}': {text}; give another place") from error
