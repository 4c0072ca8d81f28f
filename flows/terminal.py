"""What all commands share: the app, the consoles, the options, the exit codes."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from storage.artifacts import Manifest, find, get
from storage.errors import UserError
from storage.lineage import LEAST_DIGITS
from storage.objects import Store
from storage.runs import resolve_ref

app = typer.Typer(
    help="Noisy Student Training as a pipeline. Begin with: nst demo. Help on a command: nst COMMAND --help",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
PIPE_WIDTH = 200  # columns where there is no terminal: tables in logs and files are not cut
console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
errors = Console(stderr=True, soft_wrap=True)

KEY = re.compile(rf"[0-9a-f]{{{LEAST_DIGITS},32}}")
EXIT_USER_ERROR, EXIT_FAILED, EXIT_STOPPED = 2, 1, 143

StoreOption = Annotated[
    str, typer.Option(envvar="NST_STORE", help="Root of the artifacts: a folder, file:// or s3://BUCKET/PREFIX.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def artifact_of(store: Store, ref: str) -> Manifest:
    """The artifact that a ref, or the beginning of a key, names. Raises UserError where it is not in the store."""
    if KEY.fullmatch(ref):
        steps = [path.split("/") for path in store.paths("artifacts") if path.endswith("/manifest.json")]
        found = [(kind, key) for _, kind, key, _ in steps if key.startswith(ref)]
        if len(found) > 1:
            raise UserError(f"{len(found)} keys begin with {ref}; give more digits")
        if found:
            return get(store, *found[0])
    target = resolve_ref(store, ref)
    manifest = find(store, target.kind, target.key)
    if manifest is None:
        raise UserError(f"ref {ref} points at {target.kind} {target.key}, which is not in {store.url}")
    return manifest


def check_target(file: Path, force: bool | None = None) -> None:
    """Raise UserError, before anything is read, where a new file of that name cannot be made.

    `force`: of a command that has --force; None of one that has not.
    """
    if file.exists() and not force:
        raise UserError(f"{file} exists already; give another name{'' if force is None else ', or --force'}")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is no folder; make it first, or give another place")
