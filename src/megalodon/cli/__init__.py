"""The `megalodon` command. One file per command: parse, call, print; commands are listed here and imported when called."""

from __future__ import annotations

import importlib
import sys

import click
import typer
from typer.core import TyperGroup

COMMANDS = {
    "train": "Train a model from a YAML config.",
    "generate": "Continue a prompt, a file or standard input of any length.",
    "evaluate": "Measure a model on held-out text.",
    "tokenizer": "Train a byte-pair encoding on your text.",
    "convert": "Read and write other implementations' checkpoints.",
    "info": "Show versions, hardware and the back ends in use.",
}


class LazyCommands(TyperGroup):
    """Imports `megalodon.cli.<command>` only when that command runs, so that `megalodon --help` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"megalodon.cli.{name}")
        command = typer.main.get_command(module.app)
        command.name, command.short_help = name, COMMANDS[name]
        return command


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, add_completion=False, help="Language models with unlimited context.")


@app.callback()
def _root() -> None: ...


def main() -> None:
    """Entry point: bad input prints one line and exits with status 2; a defect keeps its traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError) as error:
        print(f"megalodon: {error}", file=sys.stderr)
        raise SystemExit(2) from None
