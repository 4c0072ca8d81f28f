"""Child processes: what they say arrives, their first failure is the error, and none of them outlives its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from models.checkpoints import list_checkpoints, load_checkpoint
from models.compute import ComputeConfig, LocalEngine
from models.configs import TrainConfig
from models.failures import WorkerFailed, WorkerLost
from models.launch import run_worker
from storage.errors import StoreAway, UserError
from storage.keys import digest
from tests.models.artifacts import Artifacts, training_spec

CHILD = "tests.models.child_functions:"
ROOT = Path(__file__).resolve().parents[2]
LONG = TrainConfig.model_validate(
    {
        "model": {
            "name": "resnet18",
            "args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
            "image_size": 16,
        },
        "epochs": 100_000,
        "labeled_batch": 8,
        "batch_ratio": 1,
        "replicas": 2,
        "num_validations": 1,
    }
)


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    """A folder in which each child marks its start by a file of its process id."""
    folder = tmp_path / "pids"
    folder.mkdir()
    return folder


def marked(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(ready: Callable[[], bool], timeout_s: float) -> float:
    """The seconds that it took."""
    started = time.monotonic()
    while not ready():
        assert time.monotonic() - started < timeout_s, f"not so within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - started


def assert_all_gone(folder: Path) -> None:
    """The children that marked themselves are gone, and so is every other process of ours."""
    assert marked(folder) != []
    assert [pid for pid in marked(folder) if alive(pid)] == []
    assert [p.cmdline() for p in psutil.Process().children(recursive=True) if "models.worker" in p.cmdline()] == []


def test_a_child_gets_its_spec_and_environment_and_is_heard() -> None:
    lines: list[str] = []
    records: list[dict[str, Any]] = []
    spec = {"text": "größer\n", "nested": {"list": [1, 2.5, None]}}
    result = run_worker(CHILD + "report", spec, threads=3, on_log=lines.append, on_record=records.append)
    assert result["spec"] == spec
    assert result["pid"] != os.getpid()
    assert (result["threads"], result["OMP_NUM_THREADS"], result["PYTHONSAFEPATH"]) == (3, "3", "1")
    assert records[0] == {"progress": {"done": 3, "total": 4, "unit": "images"}}
    assert sorted(lines) == ["@nst {this is no record", "a line of a library", "a warning of a library"]


def test_the_working_directorys_modules_are_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may run `nst` inside another repository that has a `models` or `tests` of its own."""
    for name in ("models", "tests", "storage"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert run_worker(CHILD + "report", {})["spec"] == {}


def test_bad_input_crosses_as_a_user_error_with_its_message() -> None:
    with pytest.raises(UserError, match=r"^select\.min_confidence=2 is above 1; lower it$"):
        run_worker(CHILD + "refuse", {})


def test_another_error_arrives_with_its_traceback_and_the_shard_that_it_is_about() -> None:
    with pytest.raises(WorkerFailed) as failure:
        run_worker(CHILD + "finish_later", {"number": 4, "seconds": 0, "error": True})
    assert "ValueError: spec 4 fails" in str(failure.value)
    assert "child_functions.py" in str(failure.value)
    first, *rest = str(failure.value).splitlines()
    assert first.endswith("finish_later failed in rank 0 of 1 at shards/train/00003.tar: ValueError: spec 4 fails")
    assert not any(set(line) <= set(" ^~") for line in rest)


def test_a_child_that_vanishes_is_an_error_with_its_exit_code_its_shard_and_last_words() -> None:
    with pytest.raises(WorkerFailed, match=r"(?s)exit code 9 at shards/train/00007.tar;.*the last words"):
        run_worker(CHILD + "vanish", {})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_is_killed_is_lost_with_the_signal_and_its_shard(number: signal.Signals) -> None:
    with pytest.raises(WorkerLost) as failure:
        run_worker(CHILD + "die", {"signal": int(number)})
    first, *rest = str(failure.value).splitlines()
    assert f"rank 0 of 1 at shards/train/00007.tar was killed by {number.name}" in first
    assert "the last words" in rest


def test_a_rank_that_is_killed_is_named_not_those_that_fail_because_of_it(pids: Path) -> None:
    """The other rank is in the middle of a collective operation, which fails at once."""
    with pytest.raises(WorkerLost, match="rank 1 of 2 at step 3 was killed by SIGKILL"):
        run_worker(CHILD + "die_in_collective", {"folder": str(pids)}, world=2)
    assert_all_gone(pids)


def test_a_store_that_is_away_crosses_as_such() -> None:
    with pytest.raises(StoreAway, match=r"^s3://bucket: object a: SlowDown$"):
        run_worker(CHILD + "find_the_store_away", {})


def test_a_rank_that_raises_is_the_error_and_leaves_no_process(pids: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerFailed) as failure:
        run_worker(CHILD + "fail_in_rank", {"folder": str(pids)}, world=2)
    assert "failed in rank 1 of 2" in str(failure.value)
    assert "RuntimeError: rank 1 cannot go on" in str(failure.value)
    assert len(marked(pids)) == 2
    assert_all_gone(pids)
    assert time.monotonic() - started < 60


def test_stop_ends_a_child_that_runs_and_one_that_has_not_started(pids: Path) -> None:
    stop = threading.Event()
    threading.Thread(target=lambda: (wait_until(lambda: bool(marked(pids)), 60), stop.set()), daemon=True).start()
    with pytest.raises(WorkerFailed, match="was asked to stop"):
        run_worker(CHILD + "sleep", {"folder": str(pids)}, stop=stop)
    assert_all_gone(pids)
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match="was asked to stop"):
        run_worker(CHILD + "sleep", {}, stop=stop)
    assert time.monotonic() - started < 10


def test_sigterm_to_two_training_ranks_writes_a_checkpoint_and_ends_within_ten_seconds(
    artifacts: Artifacts, pids: Path
) -> None:
    """As Prefect cancels: the parent asks torch elastic's agent to end, which passes it on to the ranks."""
    key = digest(["launch", "terminated"])
    spec = {"folder": str(pids), "training": training_spec(artifacts, LONG, key)}
    stop, asked = threading.Event(), []

    def stop_after_some_steps(record: dict[str, Any]) -> None:
        if record.get("progress", {}).get("done", 0) >= 20 * 16 and not stop.is_set():
            asked.append(time.monotonic())
            stop.set()

    with pytest.raises(WorkerFailed, match="was asked to stop"):
        run_worker(CHILD + "train_marked", spec, world=2, on_record=stop_after_some_steps, stop=stop)
    assert time.monotonic() - asked[0] < 10
    assert len(marked(pids)) == 2
    assert_all_gone(pids)
    (path,) = list_checkpoints(artifacts.store, key)
    state = load_checkpoint(artifacts.store, path)
    assert state is not None
    assert state["step"] >= 20


PARENT = f"""
import sys
from models.launch import run_worker
run_worker("{CHILD}sleep", {{"folder": sys.argv[1]}}, world=int(sys.argv[2]))
"""


@pytest.mark.parametrize("world", [1, 2])
def test_children_die_with_a_parent_that_was_killed(pids: Path, world: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(pids), str(world)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(marked(pids)) == world, 100)
        family = psutil.Process(parent.pid).children(recursive=True)
        assert set(marked(pids)) <= {process.pid for process in family}
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        wait_until(lambda: not any(alive(process.pid) for process in family), 10)
    finally:
        parent.kill()
        parent.wait()


def test_map_returns_results_in_the_order_of_the_specs() -> None:
    progress: list[dict[str, Any]] = []
    specs = [{"number": number, "seconds": 1.0 - 0.3 * number} for number in range(4)]
    results = LocalEngine(ComputeConfig(processes=4)).map(CHILD + "finish_later", specs, progress.append)
    assert [result["number"] for result in results] == [0, 1, 2, 3]
    assert (progress[-1]["done"], progress[-1]["total"]) == (0 + 1 + 2 + 3, 40)


def test_map_of_nothing_is_nothing() -> None:
    assert LocalEngine(ComputeConfig()).map(CHILD + "report", [], lambda progress: None) == []


def test_a_spec_that_fails_ends_the_others_and_starts_no_more(pids: Path) -> None:
    spec = {"folder": str(pids), "others": 1}
    specs = [{**spec, "number": number, "error": number == 1} for number in range(12)]
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match="spec 1 fails"):
        LocalEngine(ComputeConfig(processes=2)).map(CHILD + "fail_or_sleep", specs, lambda progress: None)
    assert len(marked(pids)) == 1, "work was started after the failure"
    assert_all_gone(pids)
    assert time.monotonic() - started < 20


def test_gang_of_one_needs_no_agent() -> None:
    result = LocalEngine(ComputeConfig(threads=2)).gang(CHILD + "report", {}, 1, lambda progress: None)
    assert result["threads"] == 2
