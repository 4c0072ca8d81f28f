"""OpenLineage events of runs and stages, where the environment asks for them: START, then COMPLETE, FAIL or ABORT.

The switch and the address are the OpenLineage client's own: `OPENLINEAGE_URL` (with `OPENLINEAGE_API_KEY`), a file that
`OPENLINEAGE_CONFIG` names, or variables that begin with `OPENLINEAGE__TRANSPORT`. What events say is in
`flows/openlineage_events.py`. No event holds up or fails a stage: they are sent from a thread of their own, and what
cannot be sent is one warning.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from storage.errors import UserError
from storage.objects import Store
from tasks.stage import DoStage

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient
    from openlineage.client.event_v2 import RunEvent

NAMES, PREFIX = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG"), "OPENLINEAGE__TRANSPORT"
QUIET_S = 60.0  # after a failure nothing is sent: a receiver that is away shall not be asked for every stage
CLOSE_S = 5.0  # for what is not sent yet at the end of a run
THREAD = "openlineage"

log = logging.getLogger("nst.openlineage")


def open_client() -> "OpenLineageClient | None":
    """The client that the environment describes; None where no events are asked for. Sends nothing yet.

    Raises UserError where the package is missing or the client cannot make sense of its settings.
    """
    asked = [name for name, value in os.environ.items() if value and (name in NAMES or name.startswith(PREFIX))]
    if not asked or os.environ.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        return None
    try:
        from openlineage.client import OpenLineageClient
    except ImportError:
        raise UserError(
            f"{asked[0]} asks for OpenLineage events, but the package openlineage-python is not installed; "
            f"pip install '.[openlineage]', or unset {asked[0]}"
        ) from None
    config = os.environ.get("OPENLINEAGE_CONFIG", "")
    if config and not Path(config).is_file():
        raise UserError(f"OPENLINEAGE_CONFIG={config}: there is no such file; name one, or unset it")
    own_log = logging.getLogger("openlineage")
    own_log.setLevel(logging.CRITICAL)  # what is wrong is said below
    try:
        client = OpenLineageClient()
    except Exception as error:  # of whatever kind: the client imports and builds what its settings name
        raise UserError(
            f"{', '.join(asked)}: no OpenLineage client can be made of these ({_first_line(error)})"
        ) from None
    finally:
        own_log.setLevel(logging.NOTSET)
    _set_up_logs()
    return client


@contextmanager
def announced(
    client: "OpenLineageClient | None", store: Store, experiment: str, do_stage: DoStage, run: str = ""
) -> Iterator[DoStage]:
    """Yields a way to carry out stages that sends the events of each attempt; without a client, `do_stage` itself.

    `run`: the name of a whole run, which gets events of its own and is the parent of the stages. Waits at the end for
    what is not sent yet, `CLOSE_S` at most.
    """
    if client is None:
        yield do_stage
        return
    from flows.openlineage_events import RunEvents

    sender = Sender(client)
    try:
        events = RunEvents(sender.send, store, experiment, run)
        with events.whole() if run else nullcontext():
            yield lambda request: do_stage(replace(request, announce=events.stage))
    finally:
        sender.close()


class Sender:
    """Builds and sends events in their order, from a thread of its own. Of what goes wrong the first is a warning."""

    def __init__(self, client: "OpenLineageClient") -> None:
        self._client, self._quiet_until, self._warned = client, 0.0, False
        self._waiting: SimpleQueue[Callable[[], RunEvent] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=THREAD, daemon=True)
        self._thread.start()

    def send(self, build: "Callable[[], RunEvent]") -> None:
        """Have an event built and sent. Returns at once."""
        self._waiting.put(build)

    def close(self) -> None:
        """Wait for what is not sent yet, `CLOSE_S` at most."""
        self._waiting.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._warn(f"not all were taken within {CLOSE_S:.0f} s after the end")

    def _work(self) -> None:
        while (build := self._waiting.get()) is not None:
            if time.monotonic() >= self._quiet_until:
                self._try(partial(self._emit, build))
        self._try(lambda: self._client.close(CLOSE_S))

    def _emit(self, build: "Callable[[], RunEvent]") -> None:
        self._client.emit(build())

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:  # whatever a receiver, a proxy, a disk or a network may say
            self._quiet_until = time.monotonic() + QUIET_S
            self._warn(_first_line(error))

    def _warn(self, cause: str) -> None:
        if not self._warned:
            log.warning("OpenLineage events are lost, the run goes on without them: %s", cause)
        self._warned = True


def _set_up_logs() -> None:
    """The client's transport `console` logs events, which nobody would see; its HTTP library logs whatever it tries again."""
    console = logging.getLogger("openlineage.client.transport.console")
    if not console.handlers:
        console.addHandler(logging.StreamHandler())
    console.setLevel(logging.INFO)
    console.propagate = False
    logging.getLogger("urllib3.connectionpool").addFilter(_of_others)


def _of_others(record: logging.LogRecord) -> bool:
    """Whether a line is of another thread than the sender's, which says itself what went wrong."""
    return record.threadName != THREAD


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
