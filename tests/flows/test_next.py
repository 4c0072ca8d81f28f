"""One more iteration on top of a finished run: what it changes, what it reuses, when it is refused."""

import json
from pathlib import Path

import pytest

from flows.next import newest_finished, next_run, with_another_iteration
from storage.errors import UserError
from storage.objects import Store
from storage.runs import latest_run, record_run
from tests.flows.runs import nst
from tests.flows.tiny import Project, finish
from tests.real_images import pngs, write_images

OFF = ("--prefect", "off")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def refusal(project: Project, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        next_run(project.store, "tiny", overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_real_run_gets_one_more_student_and_nothing_before_it_is_done_again(
    finished_copy: Path, tmp_path: Path
) -> None:
    store = ("--store", str(finished_copy))
    output = nst("next", "digits", "student.epochs=3", *store, *OFF, cwd=tmp_path)
    assert output.count(": reused") == 8, output  # all but the report
    for name in ("2/label", "2/select", "2/student", "2/evaluate", "report"):
        assert f"{name}: reused" not in output
    record = latest_run(Store(str(finished_copy)), "digits")
    assert record is not None
    keys = {node.name: node.key for node in record.nodes}
    student, labels = record.node("2/student"), record.node("2/label")
    assert student is not None
    assert labels is not None
    assert (student.config["epochs"], student.config["batch_ratio"]) == (3.0, 2.0)
    assert labels.inputs["model"] == keys["1/student"], "the latest student teaches"
    results = json.loads(nst("results", "digits", "--json", *store, cwd=tmp_path))
    assert [row["ref"] for row in results] == ["digits/0/teacher", "digits/1/student", "digits/2/student"]


def test_the_new_student_is_trained_like_the_latest_but_for_the_overrides(project: Project) -> None:
    record = record_run(project.store, finish(project.resolve("iterations.2.batch_ratio=7")).draft_record())
    same = with_another_iteration(record, ())
    assert [student.batch_ratio for student in same.iterations] == [4.0, 7.0, 7.0]
    own = with_another_iteration(record, ["student.batch_ratio=28", "iterations.3.epochs=5", "compute.ranks=1"])
    assert [(student.batch_ratio, student.epochs) for student in own.iterations] == [
        (4.0, 20.0),
        (7.0, 20.0),
        (28.0, 5.0),
    ]


def test_it_builds_on_the_newest_finished_run_and_goes_on_with_what_it_began(project: Project) -> None:
    finish(project.resolve())
    begun = next_run(project.store, "tiny", ["student.epochs=5"], "a prefect run")
    record_run(project.store, begun.draft_record())  # and then it was killed
    assert newest_finished(project.store, "tiny").number == 1
    again = next_run(project.store, "tiny", ["student.epochs=5"])
    assert again.records["3/student"].key == begun.records["3/student"].key
    finish(begun)
    assert "4/student" in next_run(project.store, "tiny").records
    retried = next_run(project.store, "tiny", ["student.epochs=5"], "a prefect run")
    assert retried.records == begun.records, "a Prefect run that is retried adds no second iteration"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.min_confidence=0.5", "it would change what is done already; set student.FIELD, which is iterations.3"),
        ("iterations.1.epochs=5", "it would change what is done already"),
        ("student.epoch=5", "unknown field iterations.3.epoch -> did you mean iterations.3.epochs?"),
        ("student.epochs=many", "iterations.3.epochs=many: input should be a valid number"),
        ("student.epochs", "has no '='"),
        ("data.shard_images=7", "prepare of run tiny/1 would be made anew"),
    ],
)
def test_a_wrong_override_is_refused_before_any_work(project: Project, override: str, message: str) -> None:
    finish(project.resolve())
    assert message in refusal(project, override)
    assert newest_finished(project.store, "tiny").name == "tiny/1"


def test_without_a_finished_run_it_says_what_to_do(project: Project) -> None:
    assert "no run 'tiny'" in refusal(project)
    finish(project.resolve(), "prepare", "unlabeled", "0/teacher")
    said = refusal(project)
    assert "no run of 'tiny' is finished" in said
    assert f"of tiny/1 0/evaluate is missing. Finish it first: nst run {project.recipe}" in said


def test_new_images_are_for_a_run_of_the_recipe_first(project: Project) -> None:
    finish(project.resolve())
    write_images(project.images / "unlabeled-2.parquet", pngs(5, 500))
    assert "unlabeled of run tiny/1 would be made anew" in refusal(project)
