import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from flows.console import planned_selection
from flows.driver import Rerun, Run, execute_node, find_node, resolve_run
from flows.plan import PlannedSelection, PlanRow, make_plan
from storage.artifacts import commit
from storage.errors import UserError
from storage.runs import record_run
from tasks import train
from tasks.selection.rules import DECISIONS
from tests.flows.runs import nst, nst_in_one_process
from tests.flows.tiny import Project, finish
from tests.real_images import pngs, write_images
from tests.tasks.selection.predicted import Row, publish_predictions


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("NST_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    return Project(tmp_path)


def plan(run: Run) -> dict[str, PlanRow]:
    return {row.name: row for row in make_plan(run)}


def reasons(run: Run) -> dict[str, tuple[str, ...]]:
    """Why, of those stages that would run."""
    return {name: row.reasons for name, row in plan(run).items() if row.status == "will run"}


def everything_below(folder: Path) -> dict[str, int]:
    """Each file and folder with the time of its last change."""
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_an_experiment_that_never_ran_runs_whole(project: Project) -> None:
    run = project.resolve()
    assert reasons(run) == dict.fromkeys(run.records, ("never run before",))
    assert [row.key for row in make_plan(run)] == [record.key for record in run.records.values()]


def test_a_finished_run_is_reused_whole(project: Project) -> None:
    run = finish(project.resolve())
    assert {row.status for row in make_plan(project.resolve())} == {"reused"}
    assert [row.key for row in make_plan(project.resolve())] == [r.key for r in run.records.values()]


def test_planning_writes_nothing(project: Project, tmp_path: Path) -> None:
    before = everything_below(tmp_path)
    make_plan(project.resolve())
    assert everything_below(tmp_path) == before
    assert not project.store.root.exists()
    finish(project.resolve(), "prepare", "unlabeled", "0/teacher")
    before = everything_below(tmp_path)
    make_plan(project.resolve("select.min_confidence=0.5", rerun="2/select"))
    assert everything_below(tmp_path) == before


def test_a_changed_threshold_is_named_and_only_what_follows_runs(project: Project) -> None:
    finish(project.resolve())
    changed = "select.min_confidence: 0.3 -> 0.5"
    assert reasons(project.resolve("select.min_confidence=0.5")) == {
        "1/select": (changed,),
        "1/student": ("input 1/select is new",),
        "1/evaluate": ("input 1/student is new",),
        "2/label": ("input 1/student is new",),
        "2/select": (changed, "input 2/label is new"),
        "2/student": ("input 2/select is new",),
        "2/evaluate": ("input 2/student is new",),
        "report": ("its inputs are new",),
    }


@pytest.mark.parametrize(
    ("override", "node", "reason"),
    [
        ("teacher.epochs=3", "0/teacher", "teacher.epochs: 50.0 -> 3.0"),
        ("train.noise.magnitude=5", "0/teacher", "teacher.noise.magnitude: 9.0 -> 5.0"),
        ("train.noise.magnitude=5", "2/student", "iterations.2.noise.magnitude: 9.0 -> 5.0"),
        ("iterations.2.batch_ratio=28", "2/student", "iterations.2.batch_ratio: 4.0 -> 28.0"),
        ("train.model.args={layers: [1]}", "1/student", "iterations.1.model.args.layers: None -> [1]"),
        ("data.seed=3", "prepare", "data.seed: 0 -> 3"),
    ],
)
def test_a_changed_field_is_named_as_in_a_recipe(project: Project, override: str, node: str, reason: str) -> None:
    finish(project.resolve())
    assert reason in reasons(project.resolve(override))[node]


def test_a_setting_that_changes_no_result_is_no_reason(project: Project) -> None:
    finish(project.resolve())
    run = project.resolve("student.allow_smaller=true", "compute.inference_batch=3")
    assert reasons(run) == {}
    both = project.resolve("student.allow_smaller=true", "student.temperature=2")
    assert reasons(both)["1/student"] == ("iterations.1.temperature: 1.0 -> 2.0",)


def test_new_changed_and_gone_files_are_named(project: Project) -> None:
    write_images(project.images / "unlabeled-b.parquet", pngs(3, 50))
    write_images(project.images / "unlabeled-c.parquet", pngs(3, 60))
    finish(project.resolve())
    write_images(project.images / "unlabeled-a.parquet", pngs(3, 70))
    write_images(project.images / "unlabeled-b.parquet", pngs(3, 80))
    (project.images / "unlabeled-c.parquet").unlink()
    assert "0/teacher" not in reasons(project.resolve()), "the teacher has nothing to do with unlabeled images"
    assert reasons(project.resolve())["unlabeled"] == (
        "file unlabeled: unlabeled-a.parquet is new",
        "file unlabeled: unlabeled-c.parquet is gone",
        "file unlabeled: unlabeled-b.parquet changed",
    )


def label(run: Run, node: str, rows: list[Row]) -> None:
    """Commit labels of these predictions as the stage `node`."""
    record, labels = run.records[node], publish_predictions(run.store, [rows])
    commit(run.store, labels.model_copy(update={"key": record.key}))


def test_a_selection_is_counted_beforehand_and_nothing_is_written(project: Project, tmp_path: Path) -> None:
    overrides = ("select.images_per_class=3", "select.min_confidence=0.5", "select.on_empty_class=skip")
    run = project.resolve(*overrides)
    label(run, "1/label", [(f"k{n}", n % 2, 0.4 + n / 20) for n in range(11)])
    before = everything_below(tmp_path)
    rows = plan(run)
    assert everything_below(tmp_path) == before
    assert rows["2/select"].selection is None, "its labels are not there"
    planned = rows["1/select"].selection
    assert planned is not None
    assert not planned.problem
    counts = [
        [row[name] for name in ("class_name", "kept", "dropped", "duplicated", "copies")] for row in planned.classes
    ]
    assert counts == [["cat", 3, 3, 0, 3], ["dog", 3, 2, 0, 3], ["owl", 0, 0, 0, 0]]


def test_counting_a_selection_leaves_the_systems_temporary_folder_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 16 bytes an image, where /tmp may be small or in memory."""
    run = project.resolve()
    label(run, "1/label", [("a", 0, 0.9), ("b", 1, 0.8), ("c", 2, 0.8)])
    monkeypatch.setattr("tempfile.tempdir", "/missing")
    planned = plan(run)["1/select"].selection
    assert planned is not None
    assert [row["kept"] for row in planned.classes] == [1, 1, 1]


def test_a_class_that_would_stay_empty_is_named_before_the_run_and_fewer_images_are_duplicated(
    project: Project,
) -> None:
    label(project.resolve(), "1/label", [("a", 0, 0.9), ("b", 1, 0.8)])
    planned = plan(project.resolve())["1/select"].selection
    assert planned is not None
    assert planned.problem.startswith("class 2 (owl) has 0 images at confidence >= 0.30")
    planned = plan(project.resolve("select.on_empty_class=skip"))["1/select"].selection
    assert planned is not None
    assert [row["duplicated"] for row in planned.classes] == [99, 99, 0]


def test_of_many_classes_the_extreme_ones_are_printed() -> None:
    names = ("available", "kept", "dropped", "duplicated", "copies", *DECISIONS)
    classes = [
        {
            "label": n,
            "class_name": f"class {n}",
            **dict.fromkeys(names, 0),
            "kept": 10,
            "dropped": n,
            "duplicated": (n * 7) % 90,
        }
        for n in range(90)
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(planned_selection("1/select", PlannedSelection(tuple(classes))))
    printed = console.export_text()
    shown = [int(number) for number in re.findall(r"^ *class (\d+)", printed, re.MULTILINE)]
    assert shown[:5] == [89, 88, 87, 86, 85]
    assert [(n * 7) % 90 for n in shown[5:]] == [89, 88, 87, 86, 85]
    assert "and 80 classes between them" in printed


def test_files_that_were_touched_or_moved_with_their_folder_change_nothing(project: Project, tmp_path: Path) -> None:
    finish(project.resolve())
    os.utime(project.images / "labeled.parquet", (1, 1))
    assert reasons(project.resolve()) == {}
    project.images = project.images.rename(tmp_path / "elsewhere")
    assert reasons(project.resolve()) == {}


def test_a_rerun_is_named_and_raises_the_generation_once(project: Project) -> None:
    finish(project.resolve())
    again = project.resolve(rerun="2/select")
    found = reasons(again)
    assert list(found) == ["2/select", "2/student", "2/evaluate", "report"]
    assert found["2/select"] == ("rerun asked for: generation 0 -> 1",)
    assert found["2/student"] == ("input 2/select is new",)
    finish(again)
    assert reasons(project.resolve()) == {}, "a plain run follows the newest generation"
    assert project.resolve().records["2/select"].generation == 1
    assert reasons(project.resolve(rerun="2/select"))["2/select"] == ("rerun asked for: generation 1 -> 2",)


def test_a_retried_prefect_run_goes_on_with_its_own_generation(project: Project) -> None:
    finish(project.resolve())
    rerun = resolve_like(project, "flow-run-1")
    record_run(project.store, rerun.draft_record())
    assert resolve_like(project, "flow-run-1").records["2/select"].generation == 1
    assert resolve_like(project, "flow-run-2").records["2/select"].generation == 2


def resolve_like(project: Project, prefect_run: str) -> Run:
    """The run of `--rerun 2/select` under a Prefect run of that id."""
    return resolve_run(
        project.resolve().experiment, project.recipe, project.store, Rerun.parse("2/select"), prefect_run
    )


def test_a_rerun_of_a_stage_that_is_not_there_names_those_that_are(project: Project) -> None:
    with pytest.raises(UserError, match="no such stage; it has prepare, unlabeled, 0/teacher"):
        project.resolve(rerun="3/select")


def test_an_interrupted_run_says_what_was_not_finished(project: Project) -> None:
    finish(project.resolve(), "prepare", "unlabeled", "0/teacher")
    found = reasons(project.resolve())
    assert set(found) == set(project.resolve().records) - {"prepare", "unlabeled", "0/teacher"}
    assert found["0/evaluate"] == found["1/label"] == ("was not finished",)
    assert found["1/select"] == ("waits for 1/label",)
    assert found["1/student"] == ("waits for 1/select",)


def test_a_batch_that_is_larger_than_the_data_is_named_before_the_run(project: Project, tmp_path: Path) -> None:
    wrong = project.resolve("teacher.labeled_batch=200")
    assert {row.problem for row in make_plan(wrong)} == {None}, "before the data is there nobody knows"
    finish(wrong, "prepare")
    found = plan(wrong)["0/teacher"].problem
    assert found is not None
    assert "teacher.labeled_batch=200 is larger than the labeled set of 100 images; set it to 100 or less" in found
    assert plan(wrong)["1/student"].problem is None
    line = ["plan", project.recipe, *project.overrides("teacher.labeled_batch=200"), "--store", str(project.store.root)]
    assert f"0/teacher will fail: {found}" in nst(*line, cwd=tmp_path)


def test_a_raised_stage_version_is_named(project: Project) -> None:
    finish(project.resolve(), "prepare")
    record = project.store.read_record("runs/tiny/1.json")
    old = next(node for node in record["nodes"] if node["name"] == "0/teacher")
    old.update(version=0, key="k" * 32, config={**old["config"], "gone_since": 3})
    project.store.replace_record("runs/tiny/1.json", record)
    found = reasons(project.resolve())["0/teacher"]
    assert f"stage train changed: version 0 -> {train.VERSION}" in found
    assert "teacher.gone_since: 3 -> None" in found


def test_an_artifact_made_by_other_code_is_marked(project: Project) -> None:
    finish(project.resolve(), code={"commit": "0123456789abcdef", "dirty": True})
    assert plan(project.resolve())["prepare"].reasons == ("made by code 0123456789 with changes",)


def test_another_experiment_of_the_same_store_reuses_what_is_equal(project: Project) -> None:
    finish(project.resolve())
    found = plan(project.resolve("name=other"))
    assert {name: row.reasons for name, row in found.items() if row.status == "will run"} == {
        "report": ("never run before",)
    }


def test_a_stage_without_its_inputs_names_those_to_run_first(project: Project) -> None:
    run = finish(project.resolve(), "prepare")
    with pytest.raises(UserError, match=r"1/select needs unlabeled, 1/label, not made yet"):
        execute_node(run, find_node(run, "1/select"), lambda request: pytest.fail("it ran"))
    with pytest.raises(UserError, match="no stage '3/select'; it has prepare, unlabeled, 0/teacher"):
        find_node(run, "3/select")


def test_plan_ls_and_results_load_no_heavy_library_and_write_nothing(project: Project, tmp_path: Path) -> None:
    finish(project.resolve(), "prepare", "unlabeled", "0/teacher")
    store = ["--store", str(project.store.root)]
    lines = [
        ["plan", project.recipe, *project.overrides("teacher.epochs=3"), *store],
        ["plan", project.recipe, *project.overrides(), "--json", *store],
        ["plan", project.recipe, *project.overrides(), "--store", str(tmp_path / "nowhere")],
        ["ls", *store],
        ["results", "tiny", *store],
        ["results", "tiny/1", "--json", *store],
    ]
    before = everything_below(tmp_path)
    output, heavy = nst_in_one_process(lines, tmp_path)
    assert heavy == []
    assert "teacher.epochs: 50.0 -> 3.0" in output
    assert everything_below(tmp_path) == before
