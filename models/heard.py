"""What a child process says: lines that begin with `@nst ` carry one JSON record (progress, result, error), others are log."""

import json
from collections.abc import Callable, Iterable
from typing import Any

RECORD_PREFIX = "@nst "
LAST_LINES = 30

Record = dict[str, Any]


def listen(
    lines: Iterable[str], on_record: Callable[[Record], None], on_log: Callable[[str], None]
) -> tuple[list[Record], list[str], str]:
    """Read a child's lines to the end. Returns its results and errors, the last lines of its log, and where it last was."""
    kept: list[Record] = []
    place = ""
    last_lines: list[str] = []
    for line in lines:
        line = line.rstrip("\n")
        record = _parse_record(line)
        if record is None:
            last_lines = [*last_lines, line][-LAST_LINES:]
            on_log(line)
            continue
        if record.keys() & {"result", "error", "killed"}:
            kept.append(record)
        place = record.get("at", place)
        on_record(record)
    return kept, last_lines, place


def _parse_record(line: str) -> Record | None:
    if not line.startswith(RECORD_PREFIX):
        return None
    try:
        record = json.loads(line.removeprefix(RECORD_PREFIX))
    except ValueError:  # two ranks' lines ran into each other
        return None
    return record if isinstance(record, dict) else None
