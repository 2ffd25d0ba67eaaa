"""Files and folders appear whole or not at all: errors, a full disk, missing rights, and a killed process."""

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from secateur import files
from secateur.errors import ArtifactError
from secateur.files import atomic_file, atomic_folder, check_writable


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "secateur.json").write_text(text)


def test_a_file_appears_and_is_replaced(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    assert names(path.parent) == ["file.txt"]


def test_a_folder_appears_and_is_replaced(tmp_path):
    for text in ("one", "two"):
        write_folder(tmp_path / "out", text)
        assert (tmp_path / "out" / "secateur.json").read_text() == text
    assert names(tmp_path) == ["out"]


def test_a_folder_is_replaced_where_the_system_cannot_swap(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    write_folder(tmp_path / "out", "one")
    write_folder(tmp_path / "out", "two")
    assert (tmp_path / "out" / "secateur.json").read_text() == "two"
    assert names(tmp_path) == ["out"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", "one")
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ArtifactError, match="could not write"):
        write_folder(tmp_path / "out", "two")
    assert (tmp_path / "out" / "secateur.json").read_text() == "one"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_block_fails(tmp_path, error):
    for context in (atomic_file, atomic_folder):
        with pytest.raises(error), context(tmp_path / "out") as temporary:
            (temporary / "x" if temporary.is_dir() else temporary).write_text("half")
            raise error
    assert names(tmp_path) == []


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.unlink()  # as a library does that writes a private file of its own
            temporary.touch(mode=0o600)
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "weights").touch(mode=0o600)
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("file", "out", "out/weights")]
    assert modes == [0o640, 0o750, 0o640]


def test_what_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for path in (tmp_path / "thesis", tmp_path / "file"):
        with pytest.raises(ArtifactError, match="was not written by Secateur"):
            write_folder(path, "x")
        with pytest.raises(ArtifactError, match="was not written by Secateur"):
            check_writable(path)
    for attempt in (lambda: atomic_file(tmp_path / "thesis").__enter__(), lambda: check_writable(tmp_path, file=True)):
        with pytest.raises(ArtifactError, match="give the name of a file"):
            attempt()
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "dear"


def test_an_empty_folder_and_the_current_one_may_be_used(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    write_folder(Path(), "x")
    assert (tmp_path / "out" / "secateur.json").read_text() == "x"


def test_a_link_is_written_through(tmp_path):
    write_folder(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "secateur.json").read_text() == "two"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "could not write"),
    ],
)
def test_what_the_system_refuses_is_said_in_one_line(tmp_path, code, message):
    for context in (atomic_file, atomic_folder):
        with pytest.raises(ArtifactError, match=message) as caught, context(tmp_path / "out"):
            raise OSError(code, os.strerror(code))
        assert "\n" not in str(caught.value)
        assert str(tmp_path / "out") in str(caught.value)
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="a file is in the way"):
        write_folder(tmp_path / "file" / "out", "x")
    with pytest.raises(ArtifactError, match="a file is in the way"):
        check_writable(tmp_path / "file" / "out")


def test_checking_leaves_nothing(tmp_path):
    check_writable(tmp_path / "deep" / "er" / "out")
    check_writable(tmp_path / "out.txt", file=True)
    assert names(tmp_path) == []


def test_no_right_to_write(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    for attempt in (lambda: check_writable(tmp_path / "out"), lambda: write_folder(tmp_path / "out", "x")):
        with pytest.raises(ArtifactError, match="no permission to write"):
            attempt()


def run(code: str, *args: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_safetensors_on_a_full_disk(tmp_path):
    """A file-size limit stops the real writer in the middle, as a full disk does."""
    code = """
        import resource, signal, sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from secateur.files import atomic_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with atomic_file(Path(sys.argv[1])) as temporary:
            save_file({"a": torch.zeros(10_000)}, temporary)
        """
    process = run(code, tmp_path / "big.safetensors")
    _, error = process.communicate(timeout=60)
    assert process.returncode
    assert "secateur.errors.ArtifactError: could not write" in error
    assert names(tmp_path) == []


def test_a_killed_process_leaves_the_old_folder_and_a_dot_name(tmp_path):
    write_folder(tmp_path / "out", "old")
    code = """
        import sys, time
        from pathlib import Path
        from secateur.files import atomic_folder
        with atomic_folder(Path(sys.argv[1])) as temporary:
            (temporary / "secateur.json").write_text("new")
            print("writing", flush=True)
            time.sleep(60)
        """
    process = run(code, tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = names(tmp_path)
    assert (tmp_path / "out" / "secateur.json").read_text() == "old"
    assert len(left) == 2
    assert left[0].startswith(".out.writing.")

    write_folder(tmp_path / "out", "newer")  # a young one may still be being written
    assert names(tmp_path) == left
    stale = time.time() - files.STALE_SECONDS - 1
    os.utime(tmp_path / left[0], (stale, stale))
    write_folder(tmp_path / "out", "newest")
    assert names(tmp_path) == ["out"]
