"""What recovers by itself: a killed rank, flow, worker or server, a store that is away; and what does not. Real kills."""

import json
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import yaml

from flows.automations import CRASH_HOURS, FILE, MOST_CRASHES, recent_crashes
from models.failures import WorkerFailed, WorkerLost
from storage.artifacts import get, list_artifacts
from storage.errors import StoreAway, StoreError, UserError
from storage.objects import Store
from storage.runs import resolve_ref
from tasks.stage import may_pass, retry_delays
from tests.flows.prefect_servers import post
from tests.flows.runs import TINY, command, nst, open_checkpoints, start, wait_for_output
from tests.flows.served import Served, serving_store

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (StoreAway("SlowDown"), True),
        (WorkerLost("killed"), True),
        (StoreError("AccessDenied"), False),
        (UserError("no such field"), False),
        (WorkerFailed("ValueError"), False),
        (KeyError("x"), False),
    ],
)
def test_only_what_may_pass_by_itself_is_tried_again(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes


def test_pauses_between_attempts_grow_to_an_hour() -> None:
    assert retry_delays(6) == [10, 40, 160, 640, 2560, 3600]
    assert retry_delays(0) == []


@pytest.mark.parametrize(
    ("states", "crashes"),
    [
        ([], 0),
        (["CRASHED", "SCHEDULED", "RUNNING", "CRASHED"], 2),
        (["CRASHED", "FAILED", "RUNNING", "CRASHED"], 1),
        (["FAILED"], 0),
    ],
)
def test_crashes_count_since_the_last_failure(states: list[str], crashes: int) -> None:
    assert recent_crashes([(state, NOW) for state in states], NOW) == crashes
    later = NOW + timedelta(hours=CRASH_HOURS)
    assert recent_crashes([(state, NOW) for state in states], later) == 0


def killed_training(store: Path, line: list[str], **environment: str) -> "subprocess.Popen[str]":
    """Start a run and kill -9 the process of its student's training as soon as it has written a checkpoint."""
    child = start(line, **environment)
    deadline = time.monotonic() + 200
    while not open_checkpoints(store):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.05)
    family = psutil.Process(child.pid).children(recursive=True)
    warm = [process for process in family if "models.warm" in process.cmdline()]
    (parent,) = [process for process in warm if process.parent() not in warm]
    (training,) = parent.children()
    training.kill()
    return child


def test_a_stage_whose_process_is_killed_is_tried_again_and_a_users_mistake_is_not(
    prefect_server: str, finished_copy: Path, tmp_path: Path
) -> None:
    store = Store(str(finished_copy))
    environment = {"PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(tmp_path / "prefect")}
    line = command(finished_copy, prefect="server", overrides=(*TINY, "student.epochs=100"))
    child = killed_training(finished_copy, line, **environment)
    output = child.communicate(timeout=200)[0]
    assert child.returncode == 0, output
    assert "1/student is tried again in 10 s, and goes on where it was: 1/student (model " in output
    assert "was killed by SIGKILL" in output
    made = get(store, "model", resolve_ref(store, "digits/1/student").key)
    assert made.provenance["resumed_at_step"] > 0
    (task,) = post(f"{prefect_server}/task_runs/filter", {"task_runs": {"name": {"any_": ["1/student"]}}})
    assert (task["run_count"], task["state"]["name"]) == (2, "Completed")

    mistake = ("select.min_confidence=1.0", "select.on_empty_class=error")
    line = command(finished_copy, *mistake, prefect="server")
    started = time.monotonic()
    child = start(line, **environment)
    output = child.communicate(timeout=200)[0]
    assert child.returncode == 2, output
    assert time.monotonic() - started < 60
    tasks = post(f"{prefect_server}/task_runs/filter", {"task_runs": {"name": {"any_": ["1/select"]}}})
    failed = [task for task in tasks if task["state"]["type"] == "FAILED"]
    assert [task["run_count"] for task in failed] == [1]


def test_automations_are_created_once_and_stay_off_where_somebody_switched_them_off(
    prefect_server: str, tmp_path: Path
) -> None:
    environment = {"PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(tmp_path / "prefect")}
    wanted = [automation["name"] for automation in yaml.safe_load(FILE.read_text())["automations"]]
    assert [f"created: {name}" for name in wanted] == nst("automations", cwd=tmp_path, **environment).splitlines()
    found = post(f"{prefect_server}/automations/filter", {})
    assert sorted(automation["name"] for automation in found) == sorted(wanted)
    assert all(automation["enabled"] for automation in found)
    set_enabled(prefect_server, found[0]["id"], False)
    assert [f"unchanged: {name}" for name in wanted] == nst("automations", cwd=tmp_path, **environment).splitlines()
    again = {automation["id"]: automation["enabled"] for automation in post(f"{prefect_server}/automations/filter", {})}
    assert again == {automation["id"]: automation is not found[0] for automation in found}


def test_automations_need_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    said = nst("automations", cwd=tmp_path, code=2, PREFECT_HOME=str(tmp_path))
    assert "set PREFECT_API_URL" in said


def set_enabled(url: str, automation: str, enabled: bool) -> None:
    """Switch an automation on or off, as the UI does."""
    request = urllib.request.Request(
        f"{url}/automations/{automation}",
        json.dumps({"enabled": enabled}).encode(),
        {"Content-Type": "application/json"},
        method="PATCH",
    )
    urllib.request.urlopen(request, timeout=20).close()


def wait_for_training(served: Served, run: str, timeout_s: float = 100) -> list[psutil.Process]:
    """The processes of the run once its network trains; the flow's own is the first."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = served.of_run(run)
        if any("models.warm" in p.cmdline() and p.children() for p in found if p.is_running()):
            return sorted(found, key=lambda process: process.create_time())
        assert time.monotonic() < deadline, served.log()
        time.sleep(0.3)


@pytest.mark.soak
def test_a_run_goes_on_by_itself_when_its_flow_the_worker_or_the_server_is_killed(
    finished_copy: Path, tmp_path: Path
) -> None:
    """And when it is cancelled it stays so, with a checkpoint and without a process."""
    with serving_store(finished_copy, tmp_path / "state") as served:
        assert served.process is not None
        run = served.train()
        services = {p.cmdline()[3]: p for p in psutil.Process(served.process.pid).children() if len(p.cmdline()) > 3}

        wait_for_training(served, run)[0].kill()
        served.wait_for_restart(run, crashes=1)
        wait_for_training(served, run)

        services["worker"].kill()
        wait_for_output(served.process, "Prefect's worker ended with code -9 and is started again")
        served.wait_for_restart(run, crashes=2)
        before = {process.pid for process in wait_for_training(served, run)}

        services["server"].kill()
        wait_for_output(served.process, "Prefect's server ended with code -9 and is started again")
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError):
                assert served.states(run)[-1] == "Running"
                break
            assert time.monotonic() < deadline, served.log()
            time.sleep(0.3)
        assert before <= {process.pid for process in served.of_run(run)}, "it has worked on all the while"
        assert open_checkpoints(served.store) == 0

        time.sleep(20)  # Prefect's worker hears of no Cancel that comes before it has found the new server
        asked = time.monotonic()
        served.call(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        while served.of_run(run):
            assert time.monotonic() - asked < 30, served.log()
            time.sleep(0.2)
        assert open_checkpoints(served.store) == 1
        assert served.wait(run, "Cancelled", timeout_s=60)
        time.sleep(5)
        assert served.states(run)[-1] == "Cancelled"
        code, said = served.end(signal.SIGINT)
        assert (code, served.left()) == (0, []), said


@pytest.mark.soak
def test_a_run_that_says_nothing_for_two_minutes_is_started_again(finished_copy: Path, tmp_path: Path) -> None:
    """Its process is stopped, as on a machine that hangs: nobody sees it end."""
    with serving_store(finished_copy, tmp_path / "state") as served:
        run = served.train()
        time.sleep(35)  # a heartbeat comes every thirty seconds, and the wait counts from the first
        stopped = wait_for_training(served, run)[0]
        stopped.suspend()
        served.wait_for_restart(run, crashes=1, timeout_s=300)
        states = served.call(f"flow_run_states/?flow_run_id={run}")
        assert [s["message"] for s in states if s["name"] == "Crashed"] == [
            "the run's process has not been heard of for two minutes"
        ]
        assert stopped.status() == psutil.STATUS_STOPPED, "nobody saw it end"
        others = [
            process for process in wait_for_training(served, run) if process.create_time() > stopped.create_time()
        ]
        assert any("prefect.engine" in process.cmdline() for process in others), "another one works on"
        stopped.kill()


@pytest.mark.soak
def test_a_run_that_crashes_again_and_again_is_ended(finished_copy: Path, tmp_path: Path) -> None:
    with serving_store(finished_copy, tmp_path / "state") as served:
        run = served.train()
        for crashes in range(1, MOST_CRASHES + 1):
            wait_for_training(served, run)[0].kill()
            if crashes < MOST_CRASHES:
                served.wait_for_restart(run, crashes)
        deadline = time.monotonic() + 150
        while served.states(run)[-1] != "Failed":
            assert time.monotonic() < deadline, served.log()
            time.sleep(0.5)
        failed = served.call(f"flow_runs/{run}")
        assert f"has crashed {MOST_CRASHES} times within 6 hours" in failed["state"]["message"]
        artifacts = list_artifacts(Store(str(served.store)))
        assert {artifact.kind for artifact in artifacts} >= {"dataset", "model", "labels", "selection"}
