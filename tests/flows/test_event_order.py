"""Events that follow one which a server, started again, has never seen; beside Prefect's own order."""

import asyncio
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from prefect.server.events.ordering import EventArrivedEarly, memory
from prefect.server.events.schemas.events import ReceivedEvent

from flows.event_order import STARTED, TIGHT_TIMING, CausalOrdering


def event(seconds: float, follows: UUID | None) -> ReceivedEvent:
    """One that occurred so long after the server's start."""
    when = STARTED + timedelta(seconds=seconds)
    resource = {"prefect.resource.id": "prefect.flow-run.1"}
    return ReceivedEvent(
        occurred=when, received=when, event="prefect.flow-run.Crashed", resource=resource, id=uuid4(), follows=follows
    )


def takes(order: memory.CausalOrdering, *events: ReceivedEvent) -> list[UUID]:
    """The events that were handled, in the order in which that happened."""
    handled: list[UUID] = []

    async def handle(event: ReceivedEvent, depth: int = 0) -> None:
        async with order.preceding_event_confirmed(handle, event, depth):
            handled.append(event.id)

    async def take_all() -> None:
        for one in events:
            try:
                await handle(one)
            except EventArrivedEarly:
                continue

    asyncio.run(take_all())
    return handled


@pytest.fixture(params=[CausalOrdering, memory.CausalOrdering], ids=["ours", "prefects"])
def order(request: pytest.FixtureRequest) -> memory.CausalOrdering:
    made: memory.CausalOrdering = request.param(scope=str(uuid4()))
    return made


def test_a_crash_after_a_restart_of_the_server_is_known_at_once(order: memory.CausalOrdering) -> None:
    """Prefect's own order lets it wait: where this fails for it, the module is needed no more."""
    crash = event(20, follows=uuid4())
    assert takes(order, crash) == ([crash.id] if isinstance(order, CausalOrdering) else [])


def test_later_an_event_waits_for_the_one_before_it(order: memory.CausalOrdering) -> None:
    first = event(TIGHT_TIMING.total_seconds() + 1, follows=None)
    second = event(TIGHT_TIMING.total_seconds() + 2, follows=first.id)
    assert takes(order, second, first) == [first.id, second.id]
