"""Whether OpenLineage events are sent, what becomes of those that cannot be, what places are called; real runs: test_openlineage.py."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attr
import pytest

from flows import openlineage_sender
from flows.openlineage_events import RunEvents, StageRunFacet, outside_place, place_of, source_location
from flows.openlineage_sender import announced, open_client
from models.compute import ComputeConfig
from models.configs import ModelConfig, TrainConfig
from storage.artifacts import Manifest
from storage.errors import StoreAway
from storage.objects import Store
from storage.runs import NodeRecord
from tasks.contract import Stage, StageContext, StageResult
from tasks.evaluators.subset import SubsetConfig
from tasks.imported import ImportConfig
from tasks.prepare import PrepareConfig
from tasks.report import ReportConfig
from tasks.stage import StageRequest, run_stage
from tasks.unlabeled import UnlabeledConfig
from tests.flows.openlineage_receiver import AWAY, LOST, ONCE, SCHEMAS, to_file, told


@pytest.fixture
def environment() -> Iterator[None]:
    """Undoes what a test, or the client within it, does to the environment."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


def made(context: StageContext, config: ReportConfig, inputs: dict[str, Manifest]) -> StageResult:
    """A stage that makes nothing."""
    return StageResult((), {})


def request_of(store: Store, work: Any, source: str = "", **more: Any) -> StageRequest:
    """A request for it."""
    stage, config = Stage("report", 1, "report", ReportConfig, work), ReportConfig(experiment="tiny")
    inputs = {"source": source} if source else {}
    record = NodeRecord(name="report", stage="report", kind="report", key="0" * 32, version=1, config={}, inputs=inputs)
    compute = ComputeConfig(device="cpu")
    return StageRequest(store.url, record, stage, config, {}, compute, **more)


def test_the_schema_in_the_repository_describes_every_field_of_our_facet() -> None:
    described = SCHEMAS[1]["$defs"]["StageRunFacet"]["allOf"][1]["properties"]
    assert set(described) == {field.name for field in attr.fields(StageRunFacet)} - {"_producer", "_schemaURL"}


def test_a_receiver_that_never_answers_holds_up_nobody(
    tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openlineage_sender, "CLOSE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        os.environ["OPENLINEAGE_URL"] = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        client, store = open_client(), Store(str(tmp_path / "store"))
        begun = time.monotonic()
        with announced(client, store, "tiny", lambda request: run_stage(request), "tiny/1") as do_stage:
            do_stage(request_of(store, made))
            assert time.monotonic() - begun < 5, "a stage waited"
        assert time.monotonic() - begun < 8
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warnings == [f"{LOST}not all were taken within 1 s after the end"]


def test_an_event_that_cannot_be_built_fails_no_stage(
    tmp_path: Path, environment: None, caplog: pytest.LogCaptureFixture
) -> None:
    os.environ.update(to_file(tmp_path / "no" / "such" / "folder.jsonl"))
    store = Store(str(tmp_path / "store"))
    with announced(open_client(), store, "tiny", lambda request: run_stage(request)) as do_stage:
        outcome = do_stage(request_of(store, made, source="0" * 32))  # of a stage that reads no files
    assert not outcome.reused
    assert [r.getMessage() for r in caplog.records] == [f"{LOST}ReportConfig names no files outside the store"]


def test_each_attempt_at_a_stage_is_a_run_of_its_own(tmp_path: Path) -> None:
    attempts: list[int] = []

    def away_at_first(context: StageContext, config: ReportConfig, inputs: dict[str, Manifest]) -> StageResult:
        attempts.append(1)
        if len(attempts) == 1:
            raise StoreAway("SlowDown\nand more")
        return made(context, config, inputs)

    store, events = Store(str(tmp_path / "store")), list[Any]()
    told_of = RunEvents(lambda build: events.append(build()), store, "tiny", "tiny/1")
    request = request_of(store, away_at_first, announce=told_of.stage)
    with pytest.raises(StoreAway):
        run_stage(request)
    run_stage(request)
    assert [event.eventType.value for event in events] == ["START", "FAIL", "START", "COMPLETE"]
    ids = [event.run.runId for event in events]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert events[1].run.facets["errorMessage"].message == "report (report 000000000000): SlowDown"


def test_nothing_is_sent_unless_it_is_asked_for(environment: None) -> None:
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE")]:
        del os.environ[name]
    assert open_client() is None
    os.environ.update(OPENLINEAGE_URL="")
    assert open_client() is None
    os.environ.update(OPENLINEAGE_URL=AWAY, OPENLINEAGE_DISABLED="true")
    assert open_client() is None


def test_a_config_file_and_a_namespace_of_ones_own_are_followed(
    tmp_path: Path, environment: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("openlineage.client.transport.console").handlers.clear()  # an earlier test's, and pytest's own
    config = tmp_path / "openlineage.yml"
    config.write_text("transport: {type: console}\n")
    os.environ.update(OPENLINEAGE_CONFIG=str(config), OPENLINEAGE_NAMESPACE="team")
    store = Store(str(tmp_path / "store"))
    with announced(open_client(), store, "tiny", lambda request: run_stage(request)) as do_stage:
        do_stage(request_of(store, made))
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert told(events) == {"tiny.report": ONCE}
    assert {event["job"]["namespace"] for event in events} == {"team"}


def test_data_sets_are_named_by_the_place_where_they_lie(tmp_path: Path) -> None:
    assert place_of("s3://team/nst/artifacts/model/1") == ("s3://team", "nst/artifacts/model/1")
    assert place_of("s3://team") == ("s3://team", "/")
    assert place_of(f"file://{tmp_path}/a%20b") == place_of(f"{tmp_path}/a b") == ("file", f"{tmp_path}/a b")
    data = {"root": str(tmp_path), "unlabeled_root": "s3://crawl/2026"}
    model = ModelConfig(name="resnet18", image_size=32)
    assert outside_place(PrepareConfig(**data)) == ("file", str(tmp_path))
    assert outside_place(UnlabeledConfig(**data)) == ("s3://crawl", "2026")
    assert outside_place(UnlabeledConfig(root="s3://photos")) == ("s3://photos", "/")
    assert outside_place(PrepareConfig(source="digits")) == ("noisy-student", "digits")
    assert outside_place(SubsetConfig(root=str(tmp_path))) == ("file", str(tmp_path))
    assert outside_place(ImportConfig(pretrained="hf-hub:timm/vit")) == ("hf-hub", "timm/vit")
    assert outside_place(ImportConfig(pretrained="resnet18.a1_in1k")) == ("hf-hub", "timm/resnet18.a1_in1k")
    own = TrainConfig(model=model, labeled_batch=8, pretrained=f"local-dir:{tmp_path}")
    assert outside_place(own) == ("file", str(tmp_path))


@pytest.mark.parametrize(
    ("remote", "url"),
    [
        ("https://user:token@example.org/team/nst.git", "https://example.org/team/nst.git"),
        ("git@example.org:team/nst.git", "git@example.org:team/nst.git"),
        ("/srv/nst", None),
    ],
)
def test_the_code_is_located_by_its_remote_without_a_token(tmp_path: Path, remote: str, url: str | None) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text(f'[remote "origin"]\n\turl = {remote}\n')
    clean = source_location(tmp_path, {"commit": "c0ffee", "dirty": False})
    changed = source_location(tmp_path, {"commit": "c0ffee", "dirty": True})
    if url is None:
        assert clean is changed is None
        return
    assert clean is not None
    assert changed is not None
    assert (clean.url, clean.version) == (url, "c0ffee")
    assert (changed.url, changed.version) == (url, None), "a changed tree is no commit"
