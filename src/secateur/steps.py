"""Finished steps of a run, kept beside its output folder, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from secateur.data import Batches
from secateur.errors import ArtifactError, SecateurError
from secateur.files import atomic_file


class Steps:
    """Results of steps, each under a name that tells what it was made from: a step is taken up only by a run that would
    make the very same.

    Args:
        out: the run's output folder; None keeps nothing.
        resume: take finished steps up; otherwise those of an earlier run are removed.
        origin: what all steps are made from, as data.

    Raises:
        ArtifactError: the place of the finished steps holds something else.
    """

    def __init__(self, out: Path | None, resume: bool, origin: list[Any]) -> None:
        self.folder = None if out is None else out.with_name(out.resolve().name + ".work")
        self.resume, self.key = resume, _hash(origin)
        self.reused: list[str] = []
        if self.folder is None or not self.folder.exists():
            return
        if not (self.folder / "run.json").is_file():
            raise ArtifactError(f"'{self.folder}' is in the way of this run's finished steps; move it away")
        if not resume:
            shutil.rmtree(self.folder)

    def keep(self, name: str, kind: Any, make: Callable[[], Any], given: list[Any]) -> Any:
        """The result of a step: read if an earlier run left it, else made and written.

        Args:
            name: file name.
            kind: class with `load(path)`, whose instances have `save(path)`.
            make: the step.
            given: what it depends on beside the steps before it, as data.
        """
        self.key = _hash([self.key, name, given])
        if self.folder is None:
            return make()
        path = self.folder / f"{self.key[:16]}.{name}"
        if self.resume and path.is_file():
            try:
                value = kind.load(path)
                self.reused.append(name.partition(".")[0])
                return value
            except SecateurError:
                pass  # damaged: made again
        value = make()
        if value is not None:
            with atomic_file(self.folder / "run.json") as temporary:
                temporary.write_text(json.dumps({"steps of": self.folder.stem}), encoding="utf-8")
            value.save(path)
        return value

    def finish(self) -> None:
        """Remove what was kept: the result is there."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


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
