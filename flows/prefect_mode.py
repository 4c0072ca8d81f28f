"""Where a command finds Prefect's API: chosen before Prefect is imported, which takes seconds."""

import os
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer

from flows.embedded import EmbeddedApi
from flows.openlineage_sender import open_client
from flows.terminal import console
from storage.errors import UserError


class PrefectMode(StrEnum):
    """Where Prefect's API is: nowhere, beside this command, or on the server that PREFECT_API_URL names."""

    off = "off"
    ephemeral = "ephemeral"
    server = "server"


PrefectOption = Annotated[
    PrefectMode, typer.Option(help="Prefect's API: off, ephemeral (beside this command), server.")
]


def set_up_prefect(mode: PrefectMode) -> Callable[[], None]:
    """Choose Prefect's API before Prefect is imported; returns what to call before a flow: it waits for the API.

    Raises UserError where a server is asked for but not named, or OpenLineage events that cannot be sent.
    """
    open_client()  # the flow opens its own, after the seconds that Prefect takes to start
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    if mode is PrefectMode.ephemeral:
        os.environ["PREFECT_PROFILE"] = "ephemeral"  # Prefect's own, whichever profile the user has made active
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # what happened is on the display
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
        return _shown_waiting(EmbeddedApi())
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        raise UserError(
            "--prefect server: no server is named; set PREFECT_API_URL (start one with `prefect server start`)"
        )
    return lambda: None


def _shown_waiting(api: EmbeddedApi) -> Callable[[], None]:
    """What waits for the API; until then a terminal says what the seconds go to."""
    status = console.status("Prefect starts")
    if console.is_terminal:
        status.start()

    def wait() -> None:
        try:
            api.wait()
        finally:
            status.stop()

    return wait
