"""Bad input ends in one clear line that names the field and the remedy, before any network is trained."""

from pathlib import Path

import pytest

from flows.driver import execute
from storage.artifacts import Manifest
from storage.errors import UserError
from storage.runs import list_experiments
from tasks.label import check_classes
from tasks.stage import StageOutcome, StageRequest, run_stage
from tests.flows.tiny import Project

BIG_ENOUGH = ("train.labeled_batch=8", "student.batch_ratio=1")


class Trained(Exception):
    """A network was about to be trained."""


def run_until_training(project: Project, *overrides: str) -> None:
    """Run for real up to the first training, which raises Trained."""

    def do_stage(request: StageRequest) -> StageOutcome:
        if request.record.stage == "train":
            raise Trained
        return run_stage(request)

    execute(project.resolve(*overrides), do_stage)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


def test_good_input_comes_to_the_training(project: Project) -> None:
    with pytest.raises(Trained):
        run_until_training(project, *BIG_ENOUGH)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.labeled_batch=32"], "teacher.labeled_batch=32 is larger than the labeled set of 24 images; set"),
        (
            [*BIG_ENOUGH, "student.batch_ratio=100"],
            r"iterations.1.batch_ratio=100.0 asks for 800 unlabeled .* at most 300; lower the ratio or raise select",
        ),
        ([*BIG_ENOUGH, "teacher.model.name=resnet81"], "teacher.model.name=resnet81: timm cannot build it .*resnet18"),
        (
            [*BIG_ENOUGH, "teacher.model.args={num_classes: 5}"],
            "teacher.model.args.num_classes: resnet18 is set to 5 classes, the data set has 3; remove",
        ),
        (
            [*BIG_ENOUGH, "student.model.args={layers: [1, 1]}"],
            "iterations.1.model: resnet18 with .* cannot take an image",
        ),
        (
            [*BIG_ENOUGH, "teacher.model.name=resnet34"],
            r"iterations.1.model: this student has .* parameters, its teacher \(teacher\) .*allow_smaller=true",
        ),
    ],
)
def test_what_is_wrong_with_a_network_is_known_before_the_first_is_trained(
    project: Project, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        run_until_training(project, *overrides)
    assert "\n" not in str(error.value)


def test_a_smaller_student_may_be_allowed(project: Project) -> None:
    with pytest.raises(Trained):
        run_until_training(project, *BIG_ENOUGH, "teacher.model.name=resnet34", "student.allow_smaller=true")


def test_ranks_must_divide_the_replicas(project: Project) -> None:
    with pytest.raises(UserError, match="compute.ranks=2 does not divide teacher.replicas=1; set compute.ranks to a"):
        project.resolve("compute.ranks=2")


def test_a_teacher_of_other_classes_is_refused(project: Project) -> None:
    def manifest(kind: str, names: list[str]) -> Manifest:
        metrics = {"class_names": names}
        fields = {"stage": kind, "stage_version": 1, "config": {}, "inputs": {}, "files": (), "metrics": metrics}
        return Manifest(kind=kind, key="0" * 32, **fields)  # type: ignore[arg-type]

    check_classes(manifest("model", ["a", "b"]), manifest("dataset", ["a", "b"]))
    with pytest.raises(UserError, match="has 3 classes, the data 2; train a teacher on this data"):
        check_classes(manifest("model", ["a", "b", "c"]), manifest("dataset", ["a", "b"]))
    with pytest.raises(UserError, match="has other class names than the data"):
        check_classes(manifest("model", ["b", "a"]), manifest("dataset", ["a", "b"]))


def test_an_unwritable_store_is_known_before_anything_else(tmp_path: Path) -> None:
    project = Project(tmp_path)
    (tmp_path / "store").write_text("a file where the store should be")
    with pytest.raises(UserError, match="cannot be written.*--store"):
        run_until_training(project, *BIG_ENOUGH)


def test_a_run_that_was_refused_leaves_no_artifact_but_those_that_are_whole(tmp_path: Path) -> None:
    project = Project(tmp_path)
    with pytest.raises(UserError):
        run_until_training(project, "train.labeled_batch=32")
    manifests = [path for path in project.store.paths("artifacts") if path.endswith("manifest.json")]
    assert [path.split("/")[1] for path in manifests] == ["dataset", "dataset"], "labeled and unlabeled images"
    assert list_experiments(project.store) == ["tiny"]
