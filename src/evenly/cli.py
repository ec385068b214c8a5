"""The ``evenly`` command. Each command parses its options and calls the library; nothing is computed here."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="evenly",
    help="Normalization and group methods: compare them, convert a trained model, check the claims.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app()
