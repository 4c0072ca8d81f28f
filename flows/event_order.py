"""The order in which a Prefect server takes the events that its automations act on; for a server that was started again.

Prefect lets an event wait that says which one it follows (a change of state within five minutes of the one before) until
that one has come by, for fifteen minutes at most. What came by it remembers in memory: after a restart of the server, a
run's crash would wait for the event of its start, fifteen minutes long, and the automations would not know of it.

Used where the server's setting PREFECT_SERVER_EVENTS_CAUSAL_ORDERING names this module (`nst serve`, compose.yaml).
"""

from datetime import UTC, datetime, timedelta

from prefect.server.events.ordering import memory
from prefect.server.events.schemas.events import ReceivedEvent

TIGHT_TIMING = timedelta(minutes=5)  # prefect.server.models.events: events further apart do not follow each other
STARTED = datetime.now(UTC)  # of this process: the server imports this before it takes its first event


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own (its setting wants this name), in which no event waits for one from before this server's start."""

    async def wait_for_leader(self, event: ReceivedEvent) -> None:
        """Return when the event's turn has come. Raises EventArrivedEarly where it has to wait."""
        leader, may_be_older = event.follows, event.occurred < STARTED + TIGHT_TIMING
        if leader is not None and may_be_older and not await self.event_has_started_processing(leader):
            return
        await super().wait_for_leader(event)
