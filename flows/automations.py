"""`nst automations`: what a Prefect server does by itself for our runs, from deployments/automations.yaml.

And what keeps it from going on for ever: a run that crashes again and again is ended (`end_crash_loop`).
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from flows.terminal import console
from storage.errors import UserError

FILE = Path(__file__).resolve().parent.parent / "deployments" / "automations.yaml"
MOST_CRASHES, CRASH_HOURS = 5, 6.0


def automations() -> None:
    """Create or update the automations on the Prefect server of PREFECT_API_URL: lost runs crash, crashed runs go on.

    Example: PREFECT_API_URL=http://127.0.0.1:4200/api nst automations
    """
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise UserError(
            "no Prefect server to create automations on; set PREFECT_API_URL, e.g. http://127.0.0.1:4200/api"
        )
    with get_client(sync_client=True) as client:
        for wanted in yaml.safe_load(FILE.read_text())["automations"]:
            found, done = client.read_automations_by_name(wanted["name"]), "created"
            if not found:
                client.create_automation(AutomationCore.model_validate(wanted))
            else:
                kept = AutomationCore.model_validate({**wanted, "enabled": found[0].enabled})
                done = "unchanged"
                if kept.model_dump() != found[0].model_dump(include=set(AutomationCore.model_fields)):
                    client.update_automation(found[0].id, kept)  # which forgets the crashes that it was to act on
                    done = "updated"
            console.print(f"{done}: {wanted['name']}", highlight=False)


def end_crash_loop(flow_run: Any) -> None:
    """Raise UserError within a flow run that has crashed often of late; its state is Failed then, and nobody restarts it.

    flow_run: `prefect.runtime.flow_run`. Crashes before the last failure do not count: after it somebody pressed Retry.
    """
    if not flow_run.id or flow_run.run_count < MOST_CRASHES:
        return
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run.id)
    crashes = recent_crashes([(state.type.value, state.timestamp) for state in states], datetime.now(UTC))
    if crashes >= MOST_CRASHES:
        raise UserError(
            f"this run has crashed {crashes} times within {CRASH_HOURS:.0f} hours and is not started again by itself; its "
            "logs and the worker's say what ended it (often want of memory). Retry goes on where it was"
        )


def recent_crashes(states: list[tuple[str, datetime]], now: datetime) -> int:
    """How often a run (its states' types and times, in order) crashed of late, since it last failed."""
    crashes = 0
    for kind, when in states:
        if kind == "FAILED":
            crashes = 0
        elif kind == "CRASHED" and now - when < timedelta(hours=CRASH_HOURS):
            crashes += 1
    return crashes
