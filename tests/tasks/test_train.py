"""The train stage before and after its training: numerics of earlier attempts, and what a machine cannot do."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from models.compute import ComputeConfig
from storage.artifacts import agree_numerics, agreed_numerics, attempts_folder
from storage.errors import UserError
from storage.objects import Store
from tasks.contract import StageContext
from tasks.train import check_compute, train
from tests.datasets import HereEngine
from tests.models.artifacts import NUMERICS, Artifacts, make_artifacts
from tests.models.training_runs import changed

COMPILED = {**NUMERICS, "compile": True}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return make_artifacts(Path(tmp_path_factory.mktemp("train")))


class Stopping(HereEngine):
    """Keeps the spec of the training and does not begin it."""

    def gang(self, function: str, spec: dict[str, Any], world: int, on_progress: Any) -> dict[str, Any]:
        self.spec = spec
        raise InterruptedError


def asked(artifacts: Artifacts, name: str, **compute: Any) -> Any:
    """The numerics that a training of this name would be given."""
    settings, engine = ComputeConfig(device="cpu", trackers=(), **compute), Stopping()
    context = StageContext(artifacts.store, name, engine, settings, name="1/student")
    with pytest.raises(InterruptedError):
        train(context, changed(), {"data": artifacts.data, "selection": artifacts.selection})
    return engine.spec["numerics"]


def checkpoint(store: Store, name: str) -> None:
    store.create(f"{attempts_folder('model', name)}/a/step-000000001-x.pt", b"x")


def test_what_is_open_is_measured_and_what_is_said_is_not(artifacts: Artifacts) -> None:
    assert asked(artifacts, "open") is None
    said = {"train_dtype": "float32", "train_layout": "channels_last", "train_compile": "always"}
    assert asked(artifacts, "said", **said) == COMPILED
    assert agreed_numerics(artifacts.store, "model", "said") == COMPILED


def test_an_attempt_without_a_checkpoint_binds_nobody_who_asks_otherwise(artifacts: Artifacts) -> None:
    """A network that cannot be compiled must not stay compiled forever."""
    agree_numerics(artifacts.store, "model", "failed", COMPILED)
    assert asked(artifacts, "failed") == COMPILED
    assert asked(artifacts, "failed", train_compile="never") == NUMERICS
    assert agreed_numerics(artifacts.store, "model", "failed") == NUMERICS


def test_a_training_with_a_checkpoint_goes_on_as_it_began_or_says_why_not(artifacts: Artifacts) -> None:
    agree_numerics(artifacts.store, "model", "begun", {**COMPILED, "device": "cuda"})
    checkpoint(artifacts.store, "begun")
    context = StageContext(
        artifacts.store, "begun", HereEngine(), ComputeConfig(device="cpu", trackers=()), name="1/student"
    )
    with pytest.raises(UserError, match=r"1/student: this training began with device cuda, .*--rerun 1/student"):
        train(context, changed(), {"data": artifacts.data, "selection": artifacts.selection})
    agree_numerics(artifacts.store, "model", "here", COMPILED)
    checkpoint(artifacts.store, "here")
    assert asked(artifacts, "here") == COMPILED


def test_event_files_lie_below_the_store_or_where_the_config_says(artifacts: Artifacts) -> None:
    found = []
    for folder in ("", "/elsewhere"):
        engine = Stopping()
        settings = ComputeConfig(device="cpu", trackers=(), log_folder=folder)
        context = StageContext(artifacts.store, "0123456789abcdef", engine, settings, name="1/student")
        with pytest.raises(InterruptedError):
            train(dataclasses.replace(context), changed(), {"data": artifacts.data, "selection": artifacts.selection})
        found.append(engine.spec["log_folder"])
    assert found == [f"{artifacts.store.root}/logs/1-student-0123456789ab", "/elsewhere/1-student-0123456789ab"]


@pytest.mark.parametrize(
    ("fields", "compute", "message"),
    [
        ({}, {"ranks": 3}, r"compute.ranks=3 does not divide teacher.replicas=2"),
        ({"batch_norm": "synchronized"}, {}, r"teacher.batch_norm=synchronized needs GPUs"),
        ({"batch_norm": "synchronized"}, {"device": "cuda"}, r"2 replicas on 1 ranks; set teacher.replicas=1"),
        ({}, {"trackers": ("wandb",)}, "compute.trackers names wandb"),
    ],
    ids=str,
)
def test_what_this_machine_cannot_do_is_said_beforehand(
    fields: dict[str, Any], compute: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_compute(changed(**fields), "teacher", ComputeConfig(**{"device": "cpu", **compute}))
