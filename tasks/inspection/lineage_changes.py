"""What differs between an artifact and its predecessor: settings, inputs, numbers, code, packages, machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.artifacts import Manifest
from tasks.inspection.facts import code_of, numbers_of

DEFAULT = "default"  # a setting that a manifest does not name
MACHINE = ("device", "machine", "host", "python", "world_size")


@dataclass(frozen=True)
class Change:
    """One line of a difference; None where one of them has no such value."""

    part: str
    name: str
    before: Any
    after: Any


def differences(before: Manifest, after: Manifest) -> list[Change]:
    """The changes from one artifact to another, part by part in the order in which they explain a result."""
    changes = []
    parts: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any], Any], ...] = (
        ("setting", flat(before.config), flat(after.config), DEFAULT),
        ("input", before.inputs, after.inputs, None),
        ("number", numbers_of(before.metrics), numbers_of(after.metrics), None),
        ("code", {"commit": code_of(before)}, {"commit": code_of(after)}, None),
        ("package", before.provenance.get("packages") or {}, after.provenance.get("packages") or {}, None),
        ("machine", _machine(before), _machine(after), None),
    )
    for part, old, new, missing in parts:
        for name in dict.fromkeys((*old, *new)):
            change = Change(part, name, old.get(name, missing), new.get(name, missing))
            if change.before != change.after:
                changes.append(change)
    return changes


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _machine(manifest: Manifest) -> dict[str, Any]:
    return {name: manifest.provenance[name] for name in MACHINE if name in manifest.provenance}
