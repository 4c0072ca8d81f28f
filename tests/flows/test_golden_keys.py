"""Keys never change by accident: the keys of a fixed experiment and every stage's defaults, as they were written down.

Where a change is meant, write them down anew: `.venv/bin/python -m tests.flows.test_golden_keys`
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import to_jsonable_python

from flows.experiment import load_experiment
from flows.graph import STAGES, build_graph, resolve_keys
from storage.keys import Config
from tests.flows.tiny import FINGERPRINTS, write_recipe

GOLDEN = Path(__file__).with_name("golden_keys.json")
WRITE_ANEW = "`.venv/bin/python -m tests.flows.test_golden_keys`"


def defaults(config: type[Config]) -> dict[str, Any]:
    """Every field of a config with its default as JSON; the fields of a section that must be given, one by one."""
    found: dict[str, Any] = {}
    for name, field in config.model_fields.items():
        if not field.is_required():
            found[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            found[name] = defaults(field.annotation)
        else:
            found[name] = "must be given"
    return found


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat.update(flatten(item, f"{prefix}{name}.") if isinstance(item, dict) and item else {f"{prefix}{name}": item})
    return flat


def stages_now() -> dict[str, Any]:
    """Of every stage: its version, its kind, its defaults, and what stays out of the key."""
    return {
        name: {
            "version": stage.version,
            "kind": stage.kind,
            "not_in_key": list(stage.config.not_in_key),
            "defaults": defaults(stage.config),
        }
        for name, stage in STAGES.items()
    }


def keys_now() -> dict[str, dict[str, str]]:
    """The keys of the tiny experiment, in both orders of work."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder))
        experiments = {order: load_experiment(recipe, [f"order={order}"]) for order in ("each_iteration", "once")}
    return {
        order: {r.name: r.key for r in resolve_keys(build_graph(experiment), FINGERPRINTS, {"2/select": 1})}
        for order, experiment in experiments.items()
    }


def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


def complaint(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is wrong with a stage's defaults and what to do; empty where all is as it was written down."""
    if before == now:
        return ""
    old, new = flatten(before["defaults"]), flatten(now["defaults"])
    fields = sorted(n for n in old if n not in new or old[n] != new[n])
    changes = [f"{n}: {old[n]!r} -> {new[n]!r}" if n in new else f"{n} is gone" for n in fields]
    if before["not_in_key"] != now["not_in_key"] or before["kind"] != now["kind"]:
        changes.append("kind or not_in_key")
    if changes and before["version"] == now["version"]:
        return (
            f"stage {name} changed ({'; '.join(changes)}) but kept its version {now['version']}, so artifacts made with the "
            f"old meaning would be reused. Raise VERSION in tasks/{name}.py to {now['version'] + 1}, then run {WRITE_ANEW}"
        )
    return f"stage {name} is not what was written down; if that is meant, run {WRITE_ANEW}"


@pytest.mark.parametrize("name", sorted({*STAGES, *golden()["stages"]}))
def test_a_changed_default_raises_the_stages_version(name: str) -> None:
    before, now = golden()["stages"].get(name), stages_now().get(name)
    assert before is not None, f"stage {name} is new; run {WRITE_ANEW}"
    assert now is not None, f"stage {name} is gone; if that is meant, run {WRITE_ANEW}"
    assert not (problem := complaint(name, before, now)), problem


@pytest.mark.parametrize("order", ["each_iteration", "once"])
def test_keys_are_those_that_were_written_down(order: str) -> None:
    before, now = golden()["keys"][order], keys_now()[order]
    different = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    assert not different, (
        f"the keys of {', '.join(different)} changed: every store's artifacts of these stages would be made anew. "
        f"Undo it, or if a stage's VERSION was raised on purpose, run {WRITE_ANEW}"
    )


def test_the_check_itself_notices_a_default_that_changed_without_a_version() -> None:
    before = {"version": 3, "kind": "model", "not_in_key": [], "defaults": {"epochs": 350.0, "noise": {"level": 9}}}
    changed = {**before, "defaults": {"epochs": 350.0, "noise": {"level": 8}}}
    assert complaint("train", before, before) == ""
    found = complaint("train", before, changed)
    assert "noise.level: 9 -> 8" in found
    assert "Raise VERSION in tasks/train.py to 4" in found
    assert "Raise VERSION" not in complaint("train", before, {**changed, "version": 4})
    grown = {**before, "defaults": {**before["defaults"], "added": 1}}
    assert "Raise VERSION" not in complaint("train", before, grown), "a new field needs no new version"
    assert complaint("train", before, grown) != "", "but it must be written down, or a later change goes unseen"
    assert "epochs is gone" in complaint("train", before, {**before, "defaults": {"noise": {"level": 9}}})


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({"stages": stages_now(), "keys": keys_now()}, indent=1) + "\n")
    print(f"wrote {GOLDEN}")
