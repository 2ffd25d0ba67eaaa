"""Writing files and folders so that a crash, a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import ArtifactError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the place of `path` only if the block ends well.

    Raises:
        ArtifactError: the place cannot be written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except Exception as e:
        if _is_os_error(e):
            raise _explain(e, path) from e
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the place of `path` only if the block ends well.

    An existing folder is replaced only if Secateur wrote it (it holds a secateur.json) or it is empty.

    Raises:
        ArtifactError: the place cannot be written, holds something else, or the disk is full.
    """
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "secateur.json").is_file())):
        raise ArtifactError(f"'{path}' exists and was not written by Secateur; give another folder or remove it")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.rename(old / "x")
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
    except Exception as e:
        if _is_os_error(e):
            raise _explain(e, path) from e
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _is_os_error(error: Exception) -> bool:
    """safetensors reports a full disk as its own error type, with the system's words inside."""
    return isinstance(error, OSError) or (
        type(error).__name__ == "SafetensorError" and "os error" in str(error).lower()
    )


def _explain(error: Exception, path: Path) -> ArtifactError:
    code = getattr(error, "errno", None)
    if code == errno.ENOSPC or "os error 28" in str(error):
        return ArtifactError(f"the disk is full while writing '{path}'; nothing was left there; free some space")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ArtifactError(f"no permission to write '{path}'; give a folder of your own")
    return ArtifactError(f"could not write '{path}': {error}")
