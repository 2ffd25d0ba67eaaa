"""The `secateur` command: collects the verbs, and turns errors into one line and an exit status."""

from __future__ import annotations

import sys

import typer

from secateur.cli import calibrate, compress, demo, evaluate, inspect, measure, plan, prune
from secateur.errors import SecateurError

app = typer.Typer(
    name="secateur",
    help="Make large pretrained transformers small and fast, without labels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(inspect.inspect)
app.command()(compress.compress)
app.command()(calibrate.calibrate)
app.command()(plan.plan)
app.command()(prune.prune)
app.command()(evaluate.evaluate)
app.command()(measure.measure)
app.command()(demo.demo)


def _version(value: bool) -> None:
    if value:
        from secateur import __version__

        print(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print and exit."),
) -> None:
    pass


def main() -> None:
    """Entry point: no traceback for anything a user can cause."""
    try:
        app()
    except SecateurError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written was left (a run with --out can go on with --resume)", 130)
    except MemoryError:
        _fail("out of memory; use a smaller --batch-size or fewer --images", 1)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or ''}", 1)


def _fail(message: str, status: int) -> None:
    sys.stdout.flush()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
