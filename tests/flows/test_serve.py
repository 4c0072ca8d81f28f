"""`nst serve`, for real: its server, its worker, its deployments; runs through the API; and what is left when it ends."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from storage.objects import Store
from storage.runs import latest_run
from tests.flows.runs import TINY, nst, open_checkpoints, start, wait_for_output
from tests.flows.tiny import RECIPE, write_recipe
from tests.real_images import write_splits

ROOT = Path(__file__).resolve().parents[2]
LONG = ("student.epochs=3000", "compute.checkpoint_steps=1000000")
READY = "Ctrl-C stops"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A `nst serve` on a store, and its API."""

    def __init__(self, store: Path, state: Path) -> None:
        self.store, self.state, self.port = store, state, free_port()
        self.process: subprocess.Popen[str] | None = None

    def begin(self, *before: str) -> "subprocess.Popen[str]":
        """Start it, `before` being a command that runs it."""
        options = ["--port", str(self.port), "--store", str(self.store), "--state", str(self.state)]
        self.process = start([*before, sys.executable, "-m", "flows.cli", "serve", *options])
        return self.process

    def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        wait_for_output(self.begin(), READY)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send it a signal; its exit code and what it said then."""
        assert self.process is not None
        self.process.send_signal(number)
        said = self.process.communicate(timeout=100)[0]
        return self.process.returncode, said

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """A request to the API: GET, or POST where it has a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}", data, {"Content-Type": "application/json"}
        )
        for _ in range(20):
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code != 503:  # SQLite is busy; Prefect's own client asks again too
                    raise
            time.sleep(1)
        raise AssertionError(f"the server's database was busy all the time: {path}")

    def click(self, deployment: str, **parameters: Any) -> str:
        """Ask for a run of a deployment, as the form does; the run's id."""
        found = self.call("deployments/filter", {"deployments": {"name": {"any_": [deployment]}}})
        created = self.call(f"deployments/{found[0]['id']}/create_flow_run", {"parameters": parameters})
        return str(created["id"])

    def wait(self, run: str, *states: str, timeout_s: float = 200) -> dict[str, Any]:
        """The run as soon as it is in one of these states."""
        deadline = time.monotonic() + timeout_s
        while True:
            found: dict[str, Any] = self.call(f"flow_runs/{run}")
            state = found["state"]
            if state["name"] in states:
                return found
            assert state["type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), (state, self.log())
            assert time.monotonic() < deadline, (state, self.log())
            time.sleep(0.3)

    def tasks(self, run: str) -> dict[str, str]:
        """The state of each stage of a run."""
        found = self.call("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [run]}}})
        return {task["name"]: task["state"]["name"] for task in found}

    def train(self) -> str:
        """Begin a long training; the run's id as soon as it is on its way."""
        run = self.click("noisy-student", recipe="digits", overrides=[*TINY, *LONG])
        deadline = time.monotonic() + 100
        while "1/student: " not in self.log():  # a line of progress
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.3)
        return run

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-5000:] for path in sorted(self.state.glob("*.log")))

    def left(self) -> list[list[str]]:
        """The processes that have its state folder in their environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("PREFECT_HOME") == str(self.state):
                    found.append(process.cmdline())
        return found


@pytest.fixture
def served(finished_copy: Path, tmp_path: Path) -> Iterator[Served]:
    """Started on the store of a finished tiny run."""
    found = Served(finished_copy, tmp_path / "state")
    try:
        found.start()
        yield found
    finally:
        if found.process is not None and found.process.poll() is None:
            found.process.kill()
            found.process.wait()


@pytest.mark.soak
def test_every_flow_is_ready_to_click_and_ctrl_c_leaves_no_process(served: Served, tmp_path: Path) -> None:
    shipped = [d["name"] for d in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]]
    found = {d["name"]: d for d in served.call("deployments/filter", {})}
    assert found.keys() == set(shipped)
    assert [schedule["active"] for schedule in found["noisy-student"]["schedules"]] == [False]
    assert {deployment["global_concurrency_limit"]["limit"] for deployment in found.values()} == {1}

    run = served.click("noisy-student", recipe="digits", overrides=list(TINY), rerun="report")
    assert served.wait(run, "Completed")["name"] == "digits"
    states = served.tasks(run)
    assert states.pop("report") == "Completed"
    assert set(states.values()) == {"Reused"}

    run = served.click("next-iteration", experiment="digits", overrides=["student.epochs=2"])
    served.wait(run, "Completed")
    record = latest_run(Store(str(served.store)), "digits")
    assert record is not None
    assert (record.prefect_run, record.nodes[-2].name) == (run, "2/evaluate")

    recipe = write_recipe(tmp_path, RECIPE)
    own = {"recipe_url": recipe, "overrides": [f"data.root={write_splits(tmp_path / 'images')}"]}
    assert served.wait(served.click("prepare", iteration=0, **own), "Completed")["name"] == "tiny prepare"

    before = served.store.stat().st_mtime_ns, Store(str(served.store)).paths("")
    failed = served.wait(served.click("noisy-student", recipe="digits", overrides=["student.epoch=3"]), "Failed")
    assert "override: unknown field student.epoch -> did you mean student.epochs?" in failed["state"]["message"]
    assert before == (served.store.stat().st_mtime_ns, Store(str(served.store)).paths("")), "no work was begun"
    with pytest.raises(urllib.error.HTTPError) as refused:
        served.click("noisy-student", recipe="no such recipe")
    assert refused.value.code in (409, 422)

    run = served.train()
    asked = time.monotonic()
    code, said = served.end(signal.SIGINT)
    assert (code, served.left()) == (0, []), said
    assert "stopping; a run that is at work writes its checkpoint first" in said
    assert time.monotonic() - asked < 60
    assert open_checkpoints(served.store) == 1, served.log()
    with sqlite3.connect(served.state / "prefect.db") as database:
        (state,) = database.execute("SELECT state_name FROM flow_run WHERE id = ?", [run]).fetchone()
    assert state == "Cancelled"


@pytest.mark.soak
def test_killed_it_takes_all_with_it_and_knows_so_the_next_time(served: Served) -> None:
    """SIGKILL, which it cannot answer; then a start on the same state, whose worker is killed in its turn."""
    run = served.train()
    assert served.process is not None
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.communicate()
    deadline = time.monotonic() + 40
    while left := served.left():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    served.start()
    state = served.call(f"flow_runs/{run}")["state"]
    assert (state["name"], "nst serve was killed" in state["message"]) == ("Crashed", True)
    line = ["serve", "--port", str(free_port()), "--store", str(served.store)]
    assert "another nst serve uses" in nst(*line, "--state", str(served.state), cwd=served.state, code=2)

    served.train()
    (worker,) = [p for p in psutil.Process(served.process.pid).children() if "worker" in p.cmdline()]
    worker.kill()
    said = served.process.communicate(timeout=60)[0]
    assert (served.process.returncode, served.left()) == (1, []), said
    assert "Prefect's worker ended with code -9" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    """Also SIGINT below a shell that ignores it, as a script does for what it starts with `&`."""
    served = Served(tmp_path / "store", tmp_path / "state")
    process = served.begin("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    try:
        deadline = time.monotonic() + 60
        while not (served.state / "server.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        code, said = served.end(number)
        assert (code, served.left()) == (0, []), said
        assert READY not in said
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        options = ["--port", port, "--store", str(tmp_path / "store"), "--state", str(tmp_path / "state")]
        said = nst("serve", *options, cwd=tmp_path, code=2)
    assert f"port {port} of 127.0.0.1 is taken" in said
    assert "choose another with --port" in said
