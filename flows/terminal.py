"""What all commands share: the app, the consoles, the options, the exit codes."""

import sys
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
PIPE_WIDTH = 200  # columns where there is no terminal: tables in logs and files are not cut
console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
errors = Console(stderr=True, soft_wrap=True)

EXIT_USER_ERROR, EXIT_FAILED, EXIT_STOPPED = 2, 1, 143

StoreOption = Annotated[
    str, typer.Option(envvar="NST_STORE", help="Root of the artifacts: a folder, file:// or s3://BUCKET/PREFIX.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
