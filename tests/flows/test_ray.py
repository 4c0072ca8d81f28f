"""The pipeline on a real Ray cluster of two nodes that share nothing but the bucket; a node that is killed."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from storage.objects import Store
from storage.verify import verify_all
from tests.flows.runs import command, contents, open_checkpoints, run, start, wait_for_output

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
PARTS = "parts/predict"


FAILING = """
import sys
from prefect import flow
from flows.ray_task_runs import offer_task_runs
from models.compute import ComputeConfig
from models.ray_engine import RayEngine
from storage.errors import UserError

@flow
def failing():
    engine = RayEngine(ComputeConfig(engine="ray", ray_address=sys.argv[1]), print, offer_task_runs)
    try:
        engine.map("tests.models.child_functions:refuse", [{}], lambda progress: None)
    except UserError as error:
        print(f"UserError: {error}", flush=True)

failing()
"""


def task_runs(prefect_home: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The states of Prefect's task runs by name, the stages' and the pieces': the latter without Prefect's own suffix."""
    with closing(sqlite3.connect(prefect_home / "prefect.db")) as database:
        found = dict(database.execute("select name, state_name from task_run").fetchall())
    pieces = {name.rpartition("-")[0]: state for name, state in found.items() if "-" in name}
    return {name: state for name, state in found.items() if "-" not in name}, pieces


class TwoNodes:
    """A head node of one core, on which drivers run, and another of one core; each has a cache of its own."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        head = {"num_cpus": 1, "include_dashboard": False, "env_vars": self._own("head")}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.other = self.cluster.add_node(num_cpus=1, env_vars=self._own("other"))
        self.settings = ("compute.engine=ray", f"compute.ray_address={self.cluster.address}")

    def kill_other(self) -> None:
        """End the second node as a machine ends that loses its power."""
        self.cluster.remove_node(self.other, allow_graceful=False)

    def _own(self, name: str) -> dict[str, str]:
        return {"NST_CACHE_DIR": str(self._folder / name)}


@pytest.fixture
def nodes(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    """Started with the bucket's address and credentials in its environment."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    found = TwoNodes(tmp_path)
    yield found
    found.cluster.shutdown()


def refused(store: str, *overrides: str) -> str:
    """The last line of a run that ends as a mistake of the user's."""
    child = start(command(store, *overrides))
    output = child.communicate(timeout=100)[0]
    assert child.returncode == 2, output
    return output.strip().splitlines()[-1]


def test_a_run_on_two_nodes_ends_with_the_artifacts_of_one_on_this_machine(
    s3: str, nodes: TwoNodes, tmp_path: Path
) -> None:
    """Pieces on both nodes, and a training with a rank on each; a cluster that is too small or away is said at once."""
    nowhere = refused(s3, "compute.engine=ray", "compute.ray_address=127.0.0.1:9")
    assert "no Ray cluster at compute.ray_address=127.0.0.1:9" in nowhere
    small = refused(s3, *nodes.settings, "train.replicas=4", "compute.ranks=4")
    assert "compute.ranks=4 needs 4 CPUs of the Ray cluster, which has 2" in small
    assert Store(s3).paths("artifacts") == []

    replicas = "train.replicas=2"
    line = command(s3, *nodes.settings, replicas, "compute.ranks=2", prefect="ephemeral")
    run(line, PREFECT_HOME=str(tmp_path / "prefect"))
    stages, pieces = task_runs(tmp_path / "prefect")
    assert stages["1/label"] == "Completed"
    assert pieces["label_shards 0"] == "Completed", "each piece is a task run of its own"
    run(command(tmp_path / "alone", replicas))
    assert contents(s3) == contents(tmp_path / "alone")
    assert verify_all(Store(s3)).problems == []
    caches = [sum(1 for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("head", "other")]
    assert min(caches) > 0, "both nodes read from the bucket"


def test_a_training_on_the_cluster_that_is_terminated_writes_a_checkpoint_and_is_gone_on_with(
    s3: str, nodes: TwoNodes
) -> None:
    rare = ("compute.checkpoint_steps=1000000", "compute.checkpoint_seconds=1000000")
    line = command(s3, *nodes.settings, *rare, "train.replicas=2", "compute.ranks=2", "teacher.epochs=2000")
    child = start(line)
    wait_for_output(child, "0/teacher: ")
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=100)[0]
    assert child.returncode == 143, said
    assert "stopped; the same command goes on where it was" in said
    assert open_checkpoints(s3) == 1


@pytest.mark.parametrize("prefect", ["off", pytest.param("ephemeral", marks=pytest.mark.soak)])
def test_the_work_of_a_node_that_is_killed_while_it_labels_moves_to_the_other(
    s3: str, nodes: TwoNodes, finished: Path, tmp_path: Path, prefect: str
) -> None:
    """As plain Ray tasks and as task runs of Prefect."""
    small = ("compute.task_images=1", "compute.shards_per_task=1")
    store, line = Store(s3), command(s3, *nodes.settings, *small, prefect=prefect)
    child = start(line, PREFECT_HOME=str(tmp_path / "prefect"))
    deadline = time.monotonic() + 300
    while not store.paths(PARTS):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    nodes.kill_other()
    output = child.communicate(timeout=400)[0]
    assert child.returncode == 0, output
    assert contents(s3) == contents(finished)
    if prefect == "ephemeral":
        _, pieces = task_runs(tmp_path / "prefect")
        assert set(pieces.values()) == {"Completed"}


def test_a_piece_that_fails_is_a_failed_task_run_and_its_error_is_the_stages(nodes: TwoNodes, tmp_path: Path) -> None:
    home = tmp_path / "prefect"
    done = subprocess.run(
        [sys.executable, "-c", FAILING, nodes.cluster.address],
        env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout.splitlines()[-1] == "UserError: select.min_confidence=2 is above 1; lower it", (
        done.stdout + done.stderr
    )
    _, pieces = task_runs(home)
    assert pieces == {"refuse 0": "Failed"}
