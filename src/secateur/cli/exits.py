"""How the command line ends: errors and interruptions in one line, libraries' chatter held back."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from secateur import progress
from secateur.errors import SecateurError, SecateurWarning


class Interrupted(BaseException):
    """Ctrl-C, under a name that no library along the way takes for its own."""


def interruptible(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that says in one line that it was interrupted, whatever the parser would make of it."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except KeyboardInterrupt as e:
            raise Interrupted(*e.args, *_notes(e)) from None

    return run


def run(command: Callable[[], None]) -> None:
    """Run the command line; no traceback for anything a user can cause."""
    _hold_back_chatter()
    try:
        command()
    except SecateurError as error:
        _fail("; ".join([str(error), *_notes(error)]))
    except (Interrupted, KeyboardInterrupt) as error:
        kept = "; ".join(map(str, error.args)) or "nothing half-written was left: give the same command again"
        _fail(f"interrupted; {kept}", 130)
    except MemoryError:
        _fail("out of memory; use a smaller --batch-size or fewer images (--limit)")
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error):
            raise
        _fail("out of memory; use a smaller --batch-size or fewer images (--limit)")
    except OSError as error:
        where = f" ('{error.filename}')" if error.filename else ""
        _fail(f"{error.strerror or error}{where}; check the path, its permissions and the space that is left")


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def _fail(message: str, status: int = 1) -> NoReturn:
    progress.close()
    sys.stdout.flush()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _hold_back_chatter() -> None:
    """Of warnings only Secateur's own are shown, as notes; of libraries' logs nothing below an error."""
    logging.getLogger().addHandler(logging.NullHandler())
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if sys.warnoptions:  # asked for with python -W or PYTHONWARNINGS
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=SecateurWarning)
    said: set[str] = set()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            print(f"note: {text}", file=sys.stderr)

    warnings.showwarning = note
