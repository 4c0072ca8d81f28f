"""Two real DDP ranks: the same network as one rank gives, also after both were killed in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from models.checkpoints import list_checkpoints
from models.configs import TrainConfig
from models.launch import run_worker
from models.training import train
from models.worker import Worker
from storage.artifacts import attempts_folder
from tests.models.artifacts import Artifacts
from tests.models.training_runs import changed, content, run, spec, weights

ROOT = Path(__file__).resolve().parents[2]
SHORT = changed(epochs=0.5)
FOUR = changed(epochs=0.5, replicas=4)
EFFICIENTNET = changed(
    model={"name": "test_efficientnet", "args": {}, "image_size": 32, "dropout": 0.2, "drop_path": 0.2},
    epochs=1,
    optimizer={"name": "rmsproptf", "lr_per_256": 0.016},
)
LONG = changed(epochs=20, num_validations=2)
KILLED_AT = 40


def on_two_ranks(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Several trainings in one gang, because starting ranks takes longer than these trainings."""
    function = "tests.models.child_functions:train_all"
    results: list[dict[str, Any]] = run_worker(function, {"trainings": list(jobs)}, world=2, threads=1)["results"]
    return results


@pytest.fixture(scope="module")
def two_ranks(artifacts: Artifacts) -> dict[str, dict[str, Any]]:
    """Trainings on two ranks, by the name of their config."""
    configs = {"plain": changed(), "four": FOUR, "efficientnet": EFFICIENTNET}
    results = on_two_ranks(*(spec(artifacts, f"two ranks {name}", config) for name, config in configs.items()))
    return dict(zip(configs, results, strict=True))


@pytest.mark.parametrize(
    ("name", "config"), [("plain", changed()), ("efficientnet", EFFICIENTNET)], ids=["resnet", "efficientnet"]
)
def test_two_replicas_are_bitwise_the_same_on_one_rank_and_on_two(
    artifacts: Artifacts, two_ranks: dict[str, dict[str, Any]], name: str, config: TrainConfig
) -> None:
    """With batch norm, dropout, stochastic depth and RandAugment on, labeled and unlabeled images mixed."""
    single, double = run(artifacts, f"one rank {name}", config), two_ranks[name]
    one, two = weights(artifacts, single), weights(artifacts, double)
    assert [tensor for tensor in one if not np.array_equal(one[tensor], two[tensor])] == []
    assert content(single)["model.safetensors"] == content(double)["model.safetensors"]
    assert single["metrics"]["val_top1"] == double["metrics"]["val_top1"]


def test_four_replicas_agree_to_rounding_on_one_rank_and_on_two(
    artifacts: Artifacts, two_ranks: dict[str, dict[str, Any]]
) -> None:
    """Three steps: from there on this tiny network, with six images a batch norm, doubles every rounding each step."""
    one, two = weights(artifacts, run(artifacts, "four", FOUR)), weights(artifacts, two_ranks["four"])
    assert max(np.abs(one[name] - two[name]).max() for name in one) < 1e-5


def test_the_number_of_replicas_is_part_of_the_result(
    artifacts: Artifacts, two_ranks: dict[str, dict[str, Any]]
) -> None:
    """Each has batch-norm statistics of its own: never take one for the other."""
    two, four = weights(artifacts, run(artifacts, "short", SHORT)), weights(artifacts, two_ranks["four"])
    assert max(np.abs(two[name] - four[name]).max() for name in two) > 1e-3


PARENT = """
import json, sys
from models.launch import run_worker
run_worker("models.training:train", json.loads(sys.argv[1]), world=2, threads=1)
"""


def test_two_ranks_killed_in_the_middle_go_on_to_the_network_of_an_undisturbed_run(artifacts: Artifacts) -> None:
    """kill -9 of their parent takes all processes along; then once more on two ranks, and on one."""
    job = spec(artifacts, "killed", LONG, compute={"checkpoint_steps": 20})
    _kill_after(artifacts, job, KILLED_AT)
    alone = spec(artifacts, "killed, then alone", LONG)
    folders = [artifacts.store.local_path(attempts_folder("model", one["key"])) for one in (job, alone)]
    shutil.copytree(*folders)
    undisturbed = spec(artifacts, "not killed", LONG)
    resumed, whole = on_two_ranks({**job, "attempt": "second"}, undisturbed)
    assert KILLED_AT <= resumed["facts"]["resumed_at_step"] < whole["metrics"]["num_steps"]
    assert content(resumed) == content(whole)
    single = train({**alone, "attempt": "second"}, Worker())
    assert single["facts"]["resumed_at_step"] == resumed["facts"]["resumed_at_step"]
    assert content(single)["model.safetensors"] == content(whole)["model.safetensors"]


def _kill_after(artifacts: Artifacts, job: dict[str, Any], steps: int) -> None:
    """Start a training of two ranks in a process of its own and kill -9 that once a checkpoint of `steps` is there."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(job)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        deadline = time.monotonic() + 200
        while not any(f"step-{steps:09d}-" in path for path in list_checkpoints(artifacts.store, job["key"])):
            assert parent.poll() is None, "the training ended before it could be killed"
            assert time.monotonic() < deadline, "the training never came to the place where it was to be killed"
            time.sleep(0.01)
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) >= 3, "an agent and two ranks"
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        _, left = psutil.wait_procs(family, timeout=15)
        assert left == [], "processes outlived the training that was killed"
    finally:
        parent.kill()
        parent.wait()
