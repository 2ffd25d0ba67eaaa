"""Benchmark tasks of a causal language model, through the LM evaluation harness (lm-eval)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from secateur._compat import ensure_torchvision
from secateur.errors import DataError, reason
from secateur.models import TextSpec, source_of
from secateur.models.hub import NO_HUB, library_call
from secateur.models.text import tokenizer


def tasks(
    model: nn.Module,
    names: Sequence[str],
    *,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 4,
    folder: str | Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Results of a model on tasks of lm-eval.

    Args:
        model: a causal language model of transformers, cut or dense.
        names: of tasks, such as "hellaswag".
        limit: use at most so many examples of each.
        few_shot: examples shown before each; the task's own number by default.
        folder: with task files (YAML) of your own; their data may be local.

    Returns:
        By task, by metric; "<metric>_stderr" is its standard error.

    Raises:
        DataError: lm-eval is not installed, a task is not known, its data cannot be had, or the model predicts no
            tokens.
        SourceError: the model's tokenizer cannot be opened.
    """
    ensure_torchvision()
    spec = source_of(model).input
    if not isinstance(spec, TextSpec) or not spec.causal:
        raise DataError(f"tasks are for causal language models, {type(model).__name__} is none")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise DataError(f"lm-eval cannot be imported ({e}): pip install 'secateur[eval]'") from e
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tool = tokenizer(spec)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [n for n in names if n not in manager.all_tasks]:
        close = get_close_matches(unknown[0], manager.all_tasks, 1)
        meant = f"; did you mean '{close[0]}'?" if close else "; see the tasks of lm-eval"
        raise DataError(f"lm-eval has no task '{unknown[0]}'{meant}")
    device = str(next(model.parameters()).device)
    try:
        with library_call():
            wrapped = HFLM(
                pretrained=model,
                tokenizer=tool,
                backend="causal",
                batch_size=batch_size,
                max_length=spec.context,
                device=device,
            )
            found: Any = lm_eval.simple_evaluate(
                wrapped,
                tasks=list(names),
                num_fewshot=few_shot,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (OSError, ValueError, RuntimeError, KeyError, AssertionError) as e:
        raise DataError(
            f"lm-eval could not run {', '.join(names)} ({reason(e)}); {NO_HUB} with task files on local data "
            "(folder=, --task-folder)"
        ) from e
    return {name: _figures(values) for name, values in found["results"].items()}


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """Numbers by metric, without the name of the filter that lm-eval appends."""
    numbers = {k.partition(",")[0]: v for k, v in values.items() if isinstance(v, (int, float))}
    return {k: float(v) for k, v in numbers.items() if k != "sample_len" and math.isfinite(v)}
