"""Killed with -9 in the middle of every stage, a run goes on there and ends with the same artifacts."""

from pathlib import Path

import pytest

from storage.objects import Store
from tests.flows.runs import command, contents, count, kill_when, run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    run(command(store))
    return store


def test_a_run_killed_in_every_stage_ends_with_the_artifacts_of_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store with spaces"
    line = command(store)
    kill_when(line, lambda: count(store, "parts/prepare", ".json") >= 2)
    prepared = set(Store(str(store)).list("parts/prepare"))
    kill_when(line, lambda: count(store, "artifacts/model", ".pt") >= 1)  # teacher
    assert prepared <= set(Store(str(store)).list("parts/prepare")), "finished shards were made again"
    checkpoints = count(store, "artifacts/model", ".pt")
    assert checkpoints >= 1
    kill_when(line, lambda: count(store, "parts/predict", ".json") >= 1)  # evaluation of the teacher
    done = count(store, "parts/predict", ".json")
    kill_when(line, lambda: count(store, "artifacts/evaluation", "manifest.json") and count(store, "parts/predict", ".json") > done + 2)
    kill_when(line, lambda: count(store, "parts/select", ".json") >= 2)
    kill_when(line, lambda: count(store, "refs/digits/1/select") and count(store, "artifacts/model", ".pt") >= checkpoints + 1)
    kill_when(line, lambda: count(store, "refs/digits/1/evaluate") >= 1)  # report
    output = run(line)
    assert "1/student: reused" in output
    assert contents(store) == contents(undisturbed)


def test_a_finished_run_reuses_every_artifact(undisturbed: Path) -> None:
    before = Store(str(undisturbed)).list("")
    output = run(command(undisturbed))
    assert output.count("reused") == 8, output
    assert Store(str(undisturbed)).list("") == before
