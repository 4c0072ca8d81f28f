"""OpenLineage events of real runs, taken by a real receiver and by files: complete, valid, and what the store says."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow.parquet as pq
import pytest
from jsonschema import ValidationError

from flows.openlineage_events import FACET, columns_of
from storage.artifacts import Manifest, get, list_artifacts
from storage.lineage import read_lineage
from storage.objects import Store
from storage.runs import latest_run, resolve_ref
from tests.flows.openlineage_receiver import (
    AWAY,
    LOST,
    ONCE,
    Event,
    check_event,
    read_file,
    receiving,
    to_file,
    told,
)
from tests.flows.runs import TINY, command, nst, open_checkpoints, run, start

API_KEY = "key-that-only-the-receiver-sees"


class Told:
    """A whole run, and what a receiver was told of it."""

    def __init__(self, path: Path, events: list[Event], headers: list[dict[str, str]], output: str) -> None:
        self.path, self.events, self.headers, self.output = path, events, headers, output
        self.store = Store(str(path))
        record = latest_run(self.store, "digits")
        assert record is not None
        self.stages = [node.name for node in record.nodes]

    def artifact(self, name: str) -> Manifest:
        target = resolve_ref(self.store, f"digits/{name}")
        return get(self.store, target.kind, target.key)

    def output_of(self, name: str) -> dict[str, Any]:
        """The data set that a stage said it made."""
        (event,) = ended(self.events, f"digits.{name}")
        (dataset,) = event["outputs"]
        return dict(dataset)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A run from an empty store. Tests may run in it what makes nothing new."""
    path = tmp_path_factory.mktemp("told") / "store"
    with receiving() as receiver:
        output = run(command(path), OPENLINEAGE_URL=receiver.url, OPENLINEAGE_API_KEY=API_KEY)
    return Told(path, receiver.events, receiver.headers, output)


def ended(events: list[Event], job: str) -> list[Event]:
    return [event for event in events if event["job"]["name"] == job and event["eventType"] != "START"]


def place(dataset: dict[str, Any]) -> tuple[str, str]:
    return dataset["namespace"], dataset["name"]


def version(dataset: dict[str, Any]) -> str:
    return str(dataset["facets"]["version"]["datasetVersion"])


def edges(events: list[Event]) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """From which data set to which one leads, by their names: what a receiver draws."""
    return {(place(i), place(o)) for event in events for o in event["outputs"] for i in event["inputs"]}


def test_the_run_and_every_stage_of_it_start_once_and_complete_once(whole: Told) -> None:
    assert told(whole.events) == {"digits": ONCE, **{f"digits.{name}": ONCE for name in whole.stages}}
    assert len(whole.stages) == 9
    assert [whole.events[0]["job"]["name"], whole.events[-1]["job"]["name"]] == ["digits", "digits"]
    times = [event["eventTime"] for event in whole.events]
    assert times == sorted(times)
    assert LOST not in whole.output


def test_every_event_is_valid_by_the_published_schema(whole: Told) -> None:
    for event in whole.events:
        check_event(event)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run", "runId"), "no uuid"),
        (("eventTime",), "yesterday"),
        (("eventType",), "ENDED"),
        (("job", "name"), None),
        (("run", "facets", FACET, "key"), "short"),
        (("run", "facets", FACET, "numbers"), {"kept": "many"}),
        (("run", "facets", "processing_engine", "version"), 3),
        (("job", "facets", "jobType", "processing"), "BATCH"),
        (("outputs", 0, "facets", "schema", "fields", 0, "name"), 3),
    ],
)
def test_an_invalid_event_is_told_from_a_valid_one(whole: Told, path: tuple[Any, ...], value: object) -> None:
    (event,) = json.loads(json.dumps(ended(whole.events, "digits.1/select")))
    check_event(event)
    at = event
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises((ValidationError, AssertionError)):
        check_event(event)


def test_the_graph_in_the_events_is_the_stores_lineage_of_the_final_student(whole: Told) -> None:
    """Walked as a receiver does, from name to name; compared as the store has it, from key to key."""
    lineage = read_lineage(whole.store)
    student = whole.artifact("1/student").key
    kept = {student, *lineage.ancestors(student)}
    expected = {(source, key) for key in kept for source in lineage.inputs(key)}

    made = {place(o): event for event in whole.events for o in event["outputs"]}
    waiting, seen, found = [place(whole.output_of("1/student"))], set(), set()
    while waiting:
        here = waiting.pop()
        if here in seen or here not in made:
            continue
        seen.add(here)
        (output,) = made[here]["outputs"]
        found |= {(version(dataset), version(output)) for dataset in made[here]["inputs"]}
        waiting += [place(dataset) for dataset in made[here]["inputs"]]
    assert found == expected
    assert len(expected) >= 8
    for name in seen:
        key = version(made[name]["outputs"][0])
        folder = whole.path / "artifacts" / lineage.nodes[key].kind / key
        assert name == ("file", str(folder))


def test_stages_are_children_of_the_run_and_attempts_have_ids_that_grow_with_time(whole: Told) -> None:
    first, *others = whole.events
    parent = {"namespace": whole.store.url, "name": "digits", "facets": {}}
    for event in others[:-1]:
        facet = event["run"]["facets"]["parent"]
        assert facet["run"]["runId"] == first["run"]["runId"]
        assert facet["job"] == parent
        assert event["job"]["namespace"] == whole.store.url
    assert "parent" not in first["run"]["facets"]
    ids = [event["run"]["runId"] for event in whole.events if event["eventType"] == "START"]
    milliseconds = [run_id[:13] for run_id in ids]
    assert milliseconds == sorted(milliseconds)
    assert len(set(ids)) == 10
    assert {UUID(run_id).version for run_id in ids} == {7}


def test_a_data_set_says_its_key_its_columns_and_how_much_was_written(whole: Told) -> None:
    for artifact in list_artifacts(whole.store):
        columns = columns_of(artifact)
        tables = {"labels": ("predictions/", "probabilities/"), "selection": ("index/",), "dataset": ("index/",)}
        if artifact.kind not in tables:
            assert columns is None
            continue
        paths = [artifact.files_under(prefix)[0].path for prefix in tables[artifact.kind]]
        real = [field for path in paths for field in pq.read_schema(whole.store.local_path(path))]
        assert [(f.name, f.type) for f in columns] == [(f.name, f.type) for f in real]
    for name, images in {
        "prepare": 60 + 100 + 200,
        "1/label": whole.artifact("1/label").metrics["images"],
        "1/select": whole.artifact("1/select").metrics["total"],
        "1/student": None,
    }.items():
        dataset, artifact = whole.output_of(name), whole.artifact(name)
        written = dataset["outputFacets"]["outputStatistics"]
        assert written.get("rowCount") == images
        assert written["size"] == sum(whole.store.sizes([entry.path for entry in artifact.files]).values())
        assert written["fileCount"] == len(artifact.files)
        assert version(dataset) == artifact.key
        assert artifact.key[:12] in dataset["facets"]["documentation"]["description"]
    named = [field["name"] for field in whole.output_of("1/label")["facets"]["schema"]["fields"]]
    assert named == ["key", "key_hash", "label", "confidence", "probabilities"]


def test_our_own_facet_has_the_numbers_that_matter(whole: Told) -> None:
    (selected,) = ended(whole.events, "digits.1/select")
    facet = selected["run"]["facets"][FACET]
    metrics = whole.artifact("1/select").metrics
    assert facet["settings"]["min_confidence"] == 0.0
    assert {name: facet["numbers"][name] for name in ("kept", "dropped", "duplicated")} == {
        name: metrics[name] for name in ("kept", "dropped", "duplicated")
    }
    assert (facet["ref"], facet["run"], facet["reused"]) == ("digits/1/select", "digits/1", False)
    (evaluated,) = ended(whole.events, "digits.1/evaluate")
    top1 = evaluated["run"]["facets"][FACET]["numbers"]["test.top1"]
    assert top1 == whole.artifact("1/evaluate").metrics["test"]["top1"]


def test_the_api_key_goes_to_the_receiver_and_nowhere_else(whole: Told) -> None:
    assert {headers["Authorization"] for headers in whole.headers} == {f"Bearer {API_KEY}"}
    assert API_KEY not in json.dumps(whole.events) + whole.output
    for path in whole.store.paths(""):
        assert API_KEY.encode() not in whole.store.read_bytes(path)


def test_a_reused_stage_leaves_the_graph_as_it_was_and_claims_to_have_written_nothing(
    whole: Told, tmp_path: Path
) -> None:
    lines = tmp_path / "events.jsonl"
    assert run(command(whole.path), **to_file(lines)).count(": reused") == 9
    events = read_file(lines)
    for event in events:
        check_event(event)
    assert told(events) == told(whole.events)
    assert edges(events) == edges(whole.events)
    for name in whole.stages:
        (event,) = ended(events, f"digits.{name}")
        assert event["run"]["facets"][FACET]["reused"] is True
        assert event["outputs"][0]["outputFacets"] == {}
    assert not {e["run"]["runId"] for e in events} & {e["run"]["runId"] for e in whole.events}


def test_a_stage_that_fails_says_why_and_so_does_its_run(finished_copy: Path, tmp_path: Path) -> None:
    lines = tmp_path / "events.jsonl"
    wrong = (*TINY, "select.min_confidence=1.0", "select.on_empty_class=error")
    child = start(command(finished_copy, overrides=wrong), **to_file(lines))
    output = child.communicate(timeout=200)[0]
    assert child.returncode == 2, output
    events = read_file(lines)
    for event in events:
        check_event(event)
    said = told(events)
    assert said["digits.1/label"] == ONCE
    assert said["digits.1/select"] == said["digits"] == ["START", "FAIL"]
    assert "digits.1/student" not in said
    for job in ("digits.1/select", "digits"):
        (event,) = ended(events, job)
        cause = event["run"]["facets"]["errorMessage"]
        assert cause["message"].startswith("1/select (selection ")
        assert "select.on_empty_class" in cause["message"]
        assert cause["message"] in cause["stackTrace"]
        assert event["outputs"] == []


@pytest.mark.parametrize("prefect", ["off", "ephemeral"])
def test_a_run_that_is_stopped_says_so_of_itself_and_of_the_stage_at_work(
    finished_copy: Path, tmp_path: Path, prefect: str
) -> None:
    lines = tmp_path / "events.jsonl"
    line = command(finished_copy, prefect=prefect, overrides=(*TINY, "student.epochs=2000"))
    child = start(line, **to_file(lines), PREFECT_HOME=str(tmp_path / "prefect"))
    deadline = time.monotonic() + 200
    while not open_checkpoints(finished_copy):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    output = child.communicate(timeout=100)[0]
    said = told(read_file(lines))
    assert said["digits.1/student"] == said["digits"] == ["START", "ABORT"], output
    assert said["digits.1/select"] == ONCE


def test_a_receiver_that_is_away_is_one_line_and_changes_no_artifact(finished_copy: Path) -> None:
    output = run(command(finished_copy, "--rerun", "report"), OPENLINEAGE_URL=AWAY)
    record = latest_run(Store(str(finished_copy)), "digits")
    assert record is not None
    keys = {node.name: node.key for node in record.nodes}
    assert output.count(LOST) == 1, output
    assert not [word for word in ("Retry", "urllib3.", "Traceback") if word in output.replace(LOST, "")], output
    run(command(finished_copy))
    again = latest_run(Store(str(finished_copy)), "digits")
    assert again is not None
    assert {node.name: node.key for node in again.nodes} == keys
    assert again.number == record.number, "events are no part of what a run is"


def test_one_stage_alone_has_events_and_no_parent_and_an_evaluation_too(whole: Told, tmp_path: Path) -> None:
    lines, store = tmp_path / "events.jsonl", ("--store", str(whole.path))
    nst("stage", "1/select", "digits", *TINY, *store, "--prefect", "off", cwd=tmp_path, **to_file(lines))
    nst("evaluate", "clean", "digits/1/student", *store, cwd=tmp_path, **to_file(lines))
    events = read_file(lines)
    for event in events:
        check_event(event)
        assert "parent" not in event["run"]["facets"]
        assert "run" not in event["run"]["facets"][FACET]
    assert told(events) == {"digits.1/select": ONCE, "evaluations.evaluate": ONCE}
    assert edges(events) <= edges(whole.events)


def test_one_more_iteration_under_prefect_names_the_flow_run(finished_copy: Path, tmp_path: Path) -> None:
    lines, home = tmp_path / "events.jsonl", {"PREFECT_HOME": str(tmp_path / "prefect")}
    nst("next", "digits", "student.epochs=2", "--store", str(finished_copy), cwd=tmp_path, **home, **to_file(lines))
    events = read_file(lines)
    said = told(events)
    assert len(said) == 14
    assert {tuple(kinds) for kinds in said.values()} == {tuple(ONCE)}
    made_now = {
        event["job"]["name"]: event["run"]["facets"][FACET]["reused"]
        for event in events
        if event["eventType"] == "COMPLETE" and event["job"]["name"] != "digits"
    }
    assert made_now["digits.1/student"] is True
    assert made_now["digits.2/student"] is False
    (event,) = ended(events, "digits.2/student")
    student = resolve_ref(Store(str(finished_copy)), "digits/2/student").key
    facet = event["run"]["facets"][FACET]
    assert facet["prefectRun"] == get(Store(str(finished_copy)), "model", student).provenance["prefect_run"] != ""


def test_events_that_cannot_be_sent_are_refused_before_anything_starts(tmp_path: Path) -> None:
    def refused(program: str, **environment: str) -> str:
        line = command(tmp_path / "store", prefect="ephemeral")[3:]
        child = start(
            [sys.executable, "-c", f"import sys; sys.argv = ['nst', *sys.argv[1:]]; {program}", *line], **environment
        )
        output = child.communicate(timeout=100)[0].strip()
        assert child.returncode == 2, output
        assert "\n" not in output
        return str(output)

    main = "from flows.cli import main; main()"
    missing = refused(f"sys.modules['openlineage'] = None; {main}", OPENLINEAGE_URL=AWAY)
    assert missing == (
        "error: OPENLINEAGE_URL asks for OpenLineage events, but the package openlineage-python is not installed; pip "
        "install '.[openlineage]', or unset OPENLINEAGE_URL"
    )
    assert "OPENLINEAGE_CONFIG=nowhere.yml: there is no such file" in refused(main, OPENLINEAGE_CONFIG="nowhere.yml")
    assert "OPENLINEAGE_URL: no OpenLineage client can be made" in refused(main, OPENLINEAGE_URL="nonsense")
    assert "pigeon" in refused(main, OPENLINEAGE__TRANSPORT__TYPE="pigeon")
    assert Store(str(tmp_path / "store")).paths("artifacts") == []
