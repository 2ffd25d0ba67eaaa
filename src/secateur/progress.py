"""Progress bars on standard error, for people only: nothing is drawn when no terminal is attached."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")

_bars: Any = None  # the one live display; bars within bars are lines of it


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar that shows what is being done, how far it is and how long it will take."""
    global _bars
    if not sys.stderr.isatty():
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    outermost = _bars is None
    if outermost:
        _bars = _display()
        _bars.start()
    bars, line = _bars, _bars.add_task(what, total=total)
    try:
        for item in items:
            yield item
            bars.advance(line)
    finally:
        if outermost:
            close()
        else:
            bars.remove_task(line)


def close() -> None:
    """Take any bar off the screen's last lines for good, so that a message can follow."""
    global _bars
    if _bars is not None:
        _bars.stop()
        _bars = None


def _display() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
