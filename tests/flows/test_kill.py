"""Killed with -9 in the middle of every stage, a run goes on there and ends with the same artifacts.

That finished parts are not made again is tested stage by stage (tests/tasks, tests/models): here nothing would show it.
"""

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.flows.runs import command, contents, count, kill_when, open_checkpoints, run, start, wait_for_output


def test_a_run_killed_in_every_stage_ends_with_the_artifacts_of_an_undisturbed_one(
    finished: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store with spaces"
    line = command(store)
    kill_when(line, lambda: count(store, "parts/ingest", ".json") >= 2)
    kill_when(line, lambda: count(store, "parts/guard", ".json") >= 1)
    assert count(store, "refs/digits/unlabeled") == 0
    kill_when(line, lambda: count(store, "artifacts/model", ".pt") >= 1)  # teacher
    kill_when(line, lambda: count(store, "parts/predict", ".json") >= 1)  # evaluation of the teacher
    assert count(store, "refs/digits/0/evaluate") == 0
    kill_when(
        line, lambda: count(store, "refs/digits/0/evaluate") > 0 and count(store, "parts/predict", ".json") >= 4
    )  # label: the evaluation has two parts
    assert count(store, "refs/digits/1/label") == 0
    kill_when(line, lambda: count(store, "parts/select", ".json") >= 2)
    assert count(store, "refs/digits/1/select") == 0
    kill_when(line, lambda: count(store, "refs/digits/1/select") > 0 and open_checkpoints(store) >= 1)
    kill_when(line, lambda: count(store, "refs/digits/1/evaluate") >= 1)  # report
    assert count(store, "refs/digits/report") == 0
    output = run(line)
    assert "1/student: reused" in output
    assert contents(store) == contents(finished)


@pytest.mark.parametrize("whom", ["the command", "its process group"])
def test_a_terminated_training_writes_a_checkpoint_and_leaves_no_process(finished_copy: Path, whom: str) -> None:
    """SIGTERM in the middle of a student's training. Prefect's Cancel sends it to the process group, where it may reach
    the loaders of batches before the training that waits for one of them."""
    store = finished_copy
    line = command(store, "--rerun", "student")
    line[line.index("compute.checkpoint_steps=5")] = "compute.checkpoint_steps=100000"
    line[line.index("student.epochs=12")] = "student.epochs=2000"
    child = start(line)
    family = wait_for_output(child, "1/student: ")
    if whom == "its process group":
        loaders = [p for p in family if len(p.parents()) - len(psutil.Process(child.pid).parents()) == 3]
        assert len(loaders) == 1
        for process in loaders:
            if os.getpgid(process.pid) == child.pid:
                process.terminate()
                process.wait(20)
        os.killpg(child.pid, signal.SIGTERM)
    else:
        child.terminate()
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 143, output
    assert open_checkpoints(store) == 1, output
    assert [process for process in family if process.is_running()] == []
