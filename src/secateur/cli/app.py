"""The `secateur` command: collects the verbs."""

from __future__ import annotations

import typer

from secateur.cli import calibrate, compress, demo, evaluate, exits, inspect, measure, plan, prune, rotate

app = typer.Typer(
    name="secateur",
    help="Make large pretrained transformers small and fast, without labels.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for verb in (
    inspect.inspect,
    compress.compress,
    calibrate.calibrate,
    rotate.rotate,
    plan.plan,
    prune.prune,
    evaluate.evaluate,
    measure.measure,
    demo.demo,
):
    app.command()(exits.interruptible(verb))


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
    """Entry point."""
    exits.run(lambda: app(prog_name="secateur"))
