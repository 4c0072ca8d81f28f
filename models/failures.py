"""What a child process's end means to its parent: bad input, a store that is away, a lost process, or a fault."""

import signal
from collections.abc import Sequence
from typing import Any

from storage.errors import StoreAway, UserError

STOPPED_EXIT_CODE = 143


class WorkerFailed(Exception):
    """A child failed; the text begins with a line that says where and why, then come the first failing rank's traceback,
    or its last lines where it left none."""


class WorkerLost(WorkerFailed):
    """A child was killed by a signal that it could not answer, often for want of memory: the same work may succeed."""


def failure_of(
    function: str,
    world: int,
    records: Sequence[dict[str, Any]],
    code: int,
    place: str,
    last_lines: Sequence[str],
    own: int = 0,
) -> UserError | WorkerFailed | None:
    """The error of a child that ended with `code`, negative for a signal; None where it left a result.

    `records` are the results and errors that it and its ranks reported, `place` is what it was at, `last_lines` its log, `own` its
    rank where it is one of a gang.
    """
    lost = _killed(records, code, own)
    if lost is not None:
        rank, number = lost
        where = f"rank {rank} of {world}{_at(place)}"
        return WorkerLost(
            f"{function}: {where} was killed by {_name(number)}; did this machine run out of memory? Its last lines:\n"
            + "\n".join(last_lines)
        )
    errors = sorted((r["error"] for r in records if "error" in r), key=lambda e: e["time"])
    if errors:
        first = errors[0]
        if first["user"]:
            return StoreAway(first["message"]) if first["away"] else UserError(first["message"])
        where = f"rank {first['rank']} of {world}{_at(first['place'])}"
        return WorkerFailed(f"{function} failed in {where}: {first['cause']}\n{first['traceback']}")
    if code == 0 and any("result" in r for r in records):
        return None
    how = "was asked to stop" if code in (STOPPED_EXIT_CODE, -signal.SIGTERM) else f"ended with exit code {code}"
    return WorkerFailed(f"{function} {how}{_at(place)}; its last lines:\n" + "\n".join(last_lines))


def _killed(records: Sequence[dict[str, Any]], code: int, own: int) -> tuple[int, int] | None:
    """The rank that a signal ended, and which; the others fail because of it, so it comes before their errors."""
    for record in records:
        if "killed" in record:
            return record["killed"]["rank"], record["killed"]["signal"]
    return (own, -code) if code < 0 and code != -signal.SIGTERM else None


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _at(place: str) -> str:
    return f" at {place}" if place else ""
