"""Training is bitwise repeatable, undisturbed or stopped and resumed; what it learns, refuses and writes down."""

from typing import Any

import numpy as np
import pytest

from models.checkpoints import list_checkpoints, load_checkpoint
from models.training import HISTORY_COLUMNS, train
from models.worker import Stopped, Worker
from storage.errors import UserError
from tests.models.artifacts import Artifacts, label_by_hand
from tests.models.training_runs import CONFIG, STEPS, DisturbedWorker, content, history, run, spec

TEACHER = CONFIG.model_copy(
    update={
        "epochs": 15.0,
        "ema_decay": 0.5,
        "label_smoothing": 0.0,
        "replicas": 1,
        "noise": CONFIG.noise.model_validate({"crop": "none", "flip": False, "num_ops": 0}),
        "optimizer": CONFIG.optimizer.model_validate({"name": "sgd", "lr_per_256": 1.6}),
        "model": CONFIG.model.model_copy(update={"dropout": 0.0, "drop_path": 0.0}),
        "bn_momentum": 0.1,
    }
)


@pytest.fixture(scope="module")
def undisturbed(artifacts: Artifacts) -> dict[str, Any]:
    return run(artifacts, "undisturbed")


def test_two_undisturbed_runs_are_bitwise_the_same(artifacts: Artifacts, undisturbed: dict[str, Any]) -> None:
    assert content(run(artifacts, "again")) == content(undisturbed)
    assert undisturbed["metrics"]["num_steps"] == STEPS


def test_another_seed_gives_another_network(artifacts: Artifacts, undisturbed: dict[str, Any]) -> None:
    other = run(artifacts, "seed", CONFIG.model_copy(update={"seed": 1}))
    assert content(other)["model.safetensors"] != content(undisturbed)["model.safetensors"]


@pytest.mark.parametrize("steps", [1, 7, STEPS])
def test_stopped_and_resumed_is_bitwise_the_undisturbed_run(
    artifacts: Artifacts, undisturbed: dict[str, Any], steps: int
) -> None:
    job = spec(artifacts, f"stopped {steps}")
    with pytest.raises(Stopped):
        train(job, DisturbedWorker(steps))
    resumed = train({**job, "attempt": "second"}, Worker())
    assert resumed["facts"]["resumed_at_step"] == steps
    assert content(resumed) == content(undisturbed)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_other_optimizers_resume_bitwise_too(artifacts: Artifacts, optimizer: str) -> None:
    settings = CONFIG.optimizer.model_validate({"name": optimizer, "lr_per_256": 0.1})
    config = CONFIG.model_copy(update={"optimizer": settings})
    job = spec(artifacts, f"resumed {optimizer}", config)
    with pytest.raises(Stopped):
        train(job, DisturbedWorker(7))
    assert content(train(job, Worker())) == content(run(artifacts, f"whole {optimizer}", config))


def test_a_run_that_broke_goes_on_from_its_last_checkpoint(artifacts: Artifacts, undisturbed: dict[str, Any]) -> None:
    """With loader processes the second time: they change nothing."""
    job = spec(artifacts, "broken", compute={"checkpoint_steps": 4})
    with pytest.raises(MemoryError):
        train(job, DisturbedWorker(11, MemoryError()))
    resumed = train({**job, "attempt": "second", "compute": {**job["compute"], "loader_workers": 2}}, Worker())
    assert resumed["facts"]["resumed_at_step"] == 8
    assert content(resumed) == content(undisturbed)


def test_an_altered_checkpoint_is_not_used_and_an_older_one_is(
    artifacts: Artifacts, undisturbed: dict[str, Any]
) -> None:
    job = spec(artifacts, "altered", compute={"checkpoint_steps": 4})
    with pytest.raises(MemoryError):
        train(job, DisturbedWorker(11, MemoryError()))
    newest, older = list_checkpoints(artifacts.store, job["key"])
    local = artifacts.store.local_path(newest)
    data = bytearray(local.read_bytes())
    data[len(data) // 2] ^= 0x10
    local.write_bytes(data)
    assert load_checkpoint(artifacts.store, newest) is None
    resumed = train({**job, "attempt": "second"}, Worker())
    assert resumed["facts"]["resumed_at_step"] == 4
    assert older.split("/")[-1].startswith("step-000000004-")
    assert content(resumed) == content(undisturbed)


def test_only_the_newest_two_checkpoints_of_an_attempt_are_kept(artifacts: Artifacts) -> None:
    job = spec(artifacts, "many", compute={"checkpoint_steps": 2})
    train(job, Worker())
    names = [path.split("/")[-1] for path in list_checkpoints(artifacts.store, job["key"])]
    assert [name.split("-")[1] for name in names] == ["000000016", "000000014"]


def test_a_loss_that_is_not_finite_is_an_error_with_the_step_and_the_remedy(artifacts: Artifacts) -> None:
    wild = {"name": "sgd", "lr_per_256": 1e6}
    config = CONFIG.model_copy(update={"optimizer": CONFIG.optimizer.model_validate(wild)})
    with pytest.raises(UserError, match=rf"not finite at step 5 of {STEPS}; it has no checkpoint. Lower .*1000000"):
        run(artifacts, "wild", config)


@pytest.fixture(scope="module")
def teacher(artifacts: Artifacts) -> dict[str, Any]:
    return run(artifacts, "teacher", TEACHER, student=False)


def test_a_teacher_learns_from_labeled_images_alone(artifacts: Artifacts, teacher: dict[str, Any]) -> None:
    found = history(artifacts, teacher)
    assert tuple(found) == HISTORY_COLUMNS
    assert set(found["loss_unlabeled"]) == {None}
    first, last = np.median(found["loss_labeled"][:9]), np.median(found["loss_labeled"][-9:])  # of batches of 8 images
    assert last < 0.3 * first
    assert teacher["metrics"]["val_top1"] >= 0.6  # chance: 0.25
    assert teacher["metrics"]["val_top1"] == found["val_top1"][-1]


def test_a_teacher_ignores_what_only_students_use(artifacts: Artifacts, teacher: dict[str, Any]) -> None:
    config = TEACHER.model_copy(update={"batch_ratio": 7.0, "pseudo_labels": "hard", "loss": "sum_of_means"})
    assert content(run(artifacts, "other teacher", config, student=False)) == content(teacher)


@pytest.mark.parametrize(
    "changed", [{"pseudo_labels": "hard"}, {"loss": "ratio_weighted"}, {"temperature": 0.5}], ids=str
)
def test_a_students_labels_and_loss_matter(
    artifacts: Artifacts, undisturbed: dict[str, Any], changed: dict[str, Any]
) -> None:
    result = run(artifacts, str(changed), CONFIG.model_copy(update=changed))
    assert content(result)["model.safetensors"] != content(undisturbed)["model.safetensors"]


def test_labels_of_a_label_artifact_replace_the_baked_ones(artifacts: Artifacts, undisturbed: dict[str, Any]) -> None:
    same = run(artifacts, "joined", labels=artifacts.labels.key)
    assert content(same) == content(undisturbed)  # the selection was baked from these
    other = label_by_hand(artifacts.store, artifacts.data, seed=2)
    assert content(run(artifacts, "relabeled", labels=other.key)) != content(undisturbed)


def test_the_history_measures_the_average_as_often_as_asked(artifacts: Artifacts, undisturbed: dict[str, Any]) -> None:
    found = history(artifacts, undisturbed)
    assert found["step"] == list(range(1, STEPS + 1))
    assert [step for step, top1 in zip(found["step"], found["val_top1"], strict=True) if top1 is not None] == [
        6,
        12,
        18,
    ]
    assert found["epoch"][-1] == CONFIG.epochs


def test_weights_decay_but_not_biases_and_batch_norm() -> None:
    from models import zoo
    from models.step import build_optimizer

    model = zoo.build(CONFIG.model, 4)
    groups = build_optimizer(model, CONFIG).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert set(by_decay) == {0.0, 1e-5}
    assert {"bn1.weight", "bn1.bias", "fc.bias"} <= by_decay[0.0]
    assert {"conv1.weight", "fc.weight"} <= by_decay[1e-5]
