"""Progress bars on standard error, for people only: nothing is drawn when no terminal is attached."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_bars: Any = None  # the one live display; bars within bars are lines of it


def track(items: Iterable[T], what: str, total: int | None = None, *, ticking: bool = True) -> Iterator[T]:
    """Iterate with a bar that shows what is being done, how far it is and how long it will take.

    Args:
        ticking: redraw from a thread, so that time passes within an item; not where the items are timed.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with _line(what, total, ticking) as (bars, line):
        for item in items:
            yield item
            if bars is not None:
                bars.advance(line)
                if not ticking:
                    bars.refresh()


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Show that something is being done that cannot say how far it is; the line goes when it is done."""
    with _line(what, None, transient=True):
        yield


@contextmanager
def _line(what: str, total: int | None, ticking: bool = True, transient: bool = False) -> Iterator[tuple[Any, Any]]:
    global _bars
    if not sys.stderr.isatty():
        yield None, None
        return
    outermost = _bars is None
    if outermost:
        _bars = _display(ticking, transient)
        _bars.start()
    bars, line = _bars, _bars.add_task(what, total=total)
    try:
        yield bars, line
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


def _display(ticking: bool, transient: bool) -> Any:
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
        auto_refresh=ticking,
        transient=transient,
    )
