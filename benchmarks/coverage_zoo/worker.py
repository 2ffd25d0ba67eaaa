"""A process that checks one model after another, so that a crash or a hang costs one row and not the run."""

from __future__ import annotations

import multiprocessing
from typing import Any

from secateur.errors import reason

TIME_LIMIT = 600  # seconds a model


class Worker:
    """One child process; replaced when it dies or takes too long."""

    def __init__(self) -> None:
        self._process: Any = None

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """The row of a case, whatever happens."""
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()  # or its death would go unnoticed
        self._pipe.send(case)
        try:
            if self._pipe.poll(TIME_LIMIT):
                return case | self._pipe.recv()
            row = {"status": "fail", "reason": f"took longer than {TIME_LIMIT} s"}
        except EOFError:
            row = {"status": "fail", "reason": "the process died (out of memory?)"}
        self.stop()
        return case | row

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def library(name: str) -> Any:
    """The module of this package that knows a library's models."""
    from coverage_zoo import hf_models, open_clip_models, text_models, timm_models

    return {"timm": timm_models, "hf": hf_models, "open_clip": open_clip_models, "text": text_models}[name]


def _serve(pipe: Any) -> None:
    import warnings

    import torch

    from secateur._compat import ensure_torchvision

    warnings.filterwarnings("ignore")
    ensure_torchvision()
    torch.set_num_threads(1)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(run_case(case))


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Build and check one model; a failure to do either is a row too."""
    from coverage_zoo.check import check

    models = library(case["library"])
    try:
        model, example, built = models.build(case)
    except Exception as e:
        return {"status": "fail", "reason": f"could not be built: {reason(e)}"}
    try:
        return {"built": built} | check(model, example, models.caller(case))
    except Exception as e:  # one model must never end the run
        return {"built": built, "status": "fail", "reason": reason(e)}
