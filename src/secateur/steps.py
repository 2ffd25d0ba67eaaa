"""Finished steps of a run, kept beside its output folder, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from secateur.data import Batches
from secateur.errors import ArtifactError, SecateurError
from secateur.files import atomic_file

NAME = "run.json"


class Steps:
    """Results of the steps of one run, each in a file, in the folder `<out>.work`.

    Args:
        out: the run's output folder; None keeps nothing.
        resume: take finished steps up; otherwise those of an earlier run are removed.
        run: everything the steps are made from, as data by name: only the very same run takes them up.

    Raises:
        ArtifactError: the folder holds something else, or the steps of another run; the message says what differs.
    """

    def __init__(self, out: Path | None, resume: bool, run: dict[str, Any]) -> None:
        self.folder = None if out is None else out.with_name(out.resolve().name + ".work")
        self.resume, self.run = resume, json.loads(json.dumps(run, default=str))
        self.reused: list[str] = []
        if self.folder is None or not self.folder.exists():
            return
        if not (self.folder / NAME).is_file():
            raise ArtifactError(f"'{self.folder}' is in the way of this run's finished steps; move it away")
        if not resume:
            shutil.rmtree(self.folder)
        elif differs := self._differences():
            raise ArtifactError(
                f"'{self.folder}' holds the steps of a run with another {'; another '.join(differs)}: give the same "
                "again, or begin anew without resume (--resume)"
            )

    def _differences(self) -> list[str]:
        """What the run that left the folder was made from and this one is not."""
        assert self.folder is not None
        try:
            old = dict(json.loads((self.folder / NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as e:
            raise ArtifactError(f"'{self.folder / NAME}' is damaged ({e}); begin anew without resume (--resume)") from e
        names = [name for name in dict.fromkeys([*self.run, *old]) if old.get(name) != self.run.get(name)]
        return [f"{name}{_change(old.get(name), self.run.get(name))}" for name in names]

    def keep(self, name: str, kind: Any, make: Callable[[], Any]) -> Any:
        """The result of a step: read if an earlier run left it, else made and written.

        Args:
            name: file name.
            kind: class with `load(path)`, whose instances have `save(path)`.
            make: the step.
        """
        if self.folder is None:
            return make()
        path = self.folder / name
        if self.resume and path.is_file():
            try:
                value = kind.load(path)
                self.reused.append(name.partition(".")[0])
                return value
            except SecateurError:
                pass  # damaged: made again
        value = make()
        if value is not None:
            with atomic_file(self.folder / NAME) as temporary:
                temporary.write_text(json.dumps(self.run, indent=1), encoding="utf-8")
            value.save(path)
        return value

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Add to what ends the run early that finished steps are kept, and how to go on from them."""
        try:
            yield
        except (SecateurError, KeyboardInterrupt) as e:
            if self.folder is not None and self.folder.exists():
                e.add_note(f"finished steps are kept in '{self.folder}': the same again with resume (--resume) goes on")
            raise

    def finish(self) -> None:
        """Remove what was kept: the result is there."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _change(old: Any, new: Any) -> str:
    """Both values, where they are short enough to be read."""
    texts = [json.dumps(value) for value in (old, new)]
    return f" ({texts[0]}, now {texts[1]})" if max(map(len, texts)) <= 40 else ""


def mark_of_images(data: Batches) -> str:
    """Which images: paths with size and time of files, contents of what is in memory."""
    parts: list[Any] = [repr(data.spec), data.size, getattr(data.items, "mark", "")]
    for item in data.items if isinstance(data.items, list) else ():
        if isinstance(item, (str, Path)):
            known = Path(item).stat()
            parts.append([str(Path(item).resolve()), known.st_size, known.st_mtime_ns])
        elif isinstance(item, (Tensor, np.ndarray, Image.Image)):
            content = item.detach().cpu().float().numpy() if isinstance(item, Tensor) else item
            parts.append(hashlib.sha256(content.tobytes()).hexdigest())
        else:
            parts.append(item)
    return _hash(parts)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()
