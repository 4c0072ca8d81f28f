"""`nst join`: this machine takes part in the trainings that another one hands out."""

from collections import deque
from typing import Annotated

import typer

from flows.terminal import console
from models.compute import ComputeConfig
from models.heard import Record
from models.launch import join as join_one
from models.meeting import Meeting
from storage.errors import UserError

KEPT_LINES = 30


def join(
    endpoint: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="compute.rdzv_endpoint of the experiment on the first machine.")
    ],
    once: Annotated[bool, typer.Option("--once", help="End with the first training, with its exit code.")] = False,
) -> None:
    """Be one of the machines of an experiment with compute.nodes: wait for its trainings and take part, until Ctrl-C.

    Example: nst join 10.0.0.5:29400
    """
    after = ""
    while True:
        try:
            meeting = Meeting.at(endpoint, first=False, after=after)
        except ValueError as error:
            raise UserError(str(error)) from error
        console.print(f"waits for a training at {endpoint}", highlight=False)
        met: list[Record] = []

        def heard(record: Record, met: list[Record] = met) -> None:
            if "met" in record:
                met.append(record["met"])
                console.print(f"takes part in {record['met']['function']} of {record['met']['store']}", highlight=False)

        lines: deque[str] = deque(maxlen=KEPT_LINES)  # torch complains of every look while nobody is there
        code = join_one(meeting, heard, lines.append)
        if not met:
            raise UserError(lines[-1] if lines else f"nothing could be taken from {endpoint}")
        after = met[0]["id"]
        console.print(
            "done" if code == 0 else f"stopped with exit code {code}; the first machine says why", highlight=False
        )
        if once:
            raise typer.Exit(code)


def say_where(compute: ComputeConfig) -> None:
    """On the first machine: what to run on the others, before a training waits for them."""
    if compute.nodes > 1:
        console.print(
            f"each training waits for {compute.nodes - 1} other machines: run `nst join {compute.rdzv_endpoint}` there",
            highlight=False,
        )
