"""A receiver of OpenLineage events on this machine, and what an event must be."""

import json
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import attr
from jsonschema import Draft202012Validator
from openlineage.client import facet_v2
from referencing import Registry, Resource

from flows.openlineage_events import FACET_SCHEMA

Event = dict[str, Any]
ONCE = ["START", "COMPLETE"]
AWAY = "http://127.0.0.1:9"  # where nobody listens
LOST = "OpenLineage events are lost, the run goes on without them: "
SCHEMAS = [
    json.loads(path.read_text())
    for path in (
        Path(__file__).with_name("openlineage_run_event.json"),
        Path(__file__).parents[2] / "docs/openlineage-stage-facet.json",
    )
]
REGISTRY: Registry[Any] = Registry().with_resources((s["$id"], Resource.from_contents(s)) for s in SCHEMAS)
PUBLISHED = {
    found._get_schema(): found
    for module in vars(facet_v2).values()
    if isinstance(module, types.ModuleType)
    for found in vars(module).values()
    if isinstance(found, type) and issubclass(found, facet_v2.BaseFacet)
}


class Receiver:
    """What was posted: events and the headers that they came with."""

    def __init__(self) -> None:
        self.url, self.events, self.headers = "", list[Event](), list[dict[str, str]]()


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on a free port, which takes every event."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/api/v1/lineage"
            receiver.events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            receiver.headers.append(dict(self.headers))
            self.send_response(201)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *parts: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()


def to_file(path: Path) -> dict[str, str]:
    """The client's own variables for events as lines of a file."""
    prefix = "OPENLINEAGE__TRANSPORT"
    return {f"{prefix}__TYPE": "file", f"{prefix}__LOG_FILE_PATH": str(path), f"{prefix}__APPEND": "true"}


def read_file(path: Path) -> list[Event]:
    """The events of such a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def told(events: list[Event]) -> dict[str, list[str]]:
    """Job -> what it said of itself, in order."""
    found: dict[str, list[str]] = {}
    for event in events:
        found.setdefault(event["job"]["name"], []).append(event["eventType"])
    return found


def facets_of(event: Event) -> Iterator[dict[str, Any]]:
    """All facets of an event."""
    yield from event["run"]["facets"].values()
    yield from event["job"]["facets"].values()
    for dataset in (*event["inputs"], *event["outputs"]):
        for kind in ("facets", "inputFacets", "outputFacets"):
            yield from dataset.get(kind, {}).values()


def check_event(event: Event) -> None:
    """Fail on an event that OpenLineage's core schema, a facet's form or our own facet's schema does not allow.

    The form of a published facet is the client's class, which is generated from the facet's schema.
    """
    assert event["schemaURL"].startswith(SCHEMAS[0]["$id"])
    _validate({"$ref": SCHEMAS[0]["$id"]}, event)
    for facet in facets_of(event):
        if facet["_schemaURL"].startswith(FACET_SCHEMA):
            _validate({"$ref": facet["_schemaURL"]}, facet)
        else:
            _check_form(PUBLISHED[facet["_schemaURL"]], facet)


def _validate(schema: dict[str, str], value: Event) -> None:
    checker = Draft202012Validator.FORMAT_CHECKER
    assert {"date-time", "uuid"} <= set(checker.checkers)
    Draft202012Validator(schema, registry=REGISTRY, format_checker=checker).validate(value)


def _check_form(form: type, value: dict[str, Any]) -> None:
    """Fail where a JSON object has other fields than an attrs class, lacks one, or has one of another type."""
    fields, hints = attr.fields(form), typing.get_type_hints(form)
    assert {f.name for f in fields if f.default is attr.NOTHING} <= set(value) <= {f.name for f in fields}, value
    for name, own in value.items():
        inner = [t for t in _types(hints[name]) if attr.has(t)]
        if inner:
            for part in own if isinstance(own, list) else [own]:
                _check_form(inner[0], part)
        else:
            assert isinstance(own, tuple(_types(hints[name]))), (name, own)


def _types(hint: Any) -> list[type]:
    """The plain types that a hint is made of: `list[A] | None` -> list, A, None."""
    parts = [t for part in typing.get_args(hint) for t in _types(part)]
    plain = typing.get_origin(hint) or hint
    return [*parts, plain] if isinstance(plain, type) and plain is not types.UnionType else parts
