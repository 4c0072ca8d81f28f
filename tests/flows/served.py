"""A real `nst serve` for tests: its API, its runs, its processes."""

import base64
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.flows.runs import TINY, read_until, start

LONG = ("student.epochs=3000", "compute.checkpoint_steps=1000000", "compute.checkpoint_seconds=1000000")
READY = "Ctrl-C stops"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    """A `nst serve` on a store, and its API."""

    def __init__(self, store: Path, state: Path, password: str = "") -> None:
        self.store, self.state, self.port, self._password = store, state, free_port(), password
        self.process: subprocess.Popen[str] | None = None
        self.said = ""  # up to being ready

    def begin(self, *before: str) -> "subprocess.Popen[str]":
        """Start it, `before` being a command that runs it."""
        options = ["--port", str(self.port), "--store", str(self.store), "--state", str(self.state)]
        own = {"PREFECT_SERVER_API_AUTH_STRING": self._password} if self._password else {}
        self.process = start([*before, sys.executable, "-m", "flows.cli", "serve", *options], **own)
        return self.process

    def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        self.said = read_until(self.begin(), READY)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send it a signal; its exit code and what it said then."""
        assert self.process is not None
        self.process.send_signal(number)
        said = self.process.communicate(timeout=100)[0]
        return self.process.returncode, said

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """A request to the API: GET, or POST where it has a body."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self._password:
            headers["Authorization"] = f"Basic {base64.b64encode(self._password.encode()).decode()}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/{path}", data, headers)
        for _ in range(20):
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code != 503:  # SQLite is busy; Prefect's own client asks again too
                    raise
            time.sleep(1)
        raise AssertionError(f"the server's database was busy all the time: {path}")

    def deployment(self, name: str) -> dict[str, Any]:
        """A deployment as the server has it."""
        (found,) = self.call("deployments/filter", {"deployments": {"name": {"any_": [name]}}})
        return dict(found)

    def click(self, deployment: str, **parameters: Any) -> str:
        """Ask for a run of a deployment, as the form does; the run's id."""
        identity = self.deployment(deployment)["id"]
        return str(self.call(f"deployments/{identity}/create_flow_run", {"parameters": parameters})["id"])

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

    def states(self, run: str) -> list[str]:
        """The names of a run's states so far, in order."""
        states = self.call(f"flow_run_states/?flow_run_id={run}")
        return [state["name"] for state in sorted(states, key=lambda state: state["timestamp"])]

    def wait_for_restart(self, run: str, crashes: int, timeout_s: float = 150) -> None:
        """Wait until the run has crashed so often, and is running again."""
        deadline = time.monotonic() + timeout_s
        while True:
            states = self.states(run)
            if states.count("Crashed") == crashes and states[-1] == "Running":
                return
            assert time.monotonic() < deadline, (states, self.log())
            time.sleep(0.5)

    def tasks(self, run: str) -> dict[str, str]:
        """The state of each stage of a run, when it was last tried."""
        found = self.call("task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [run]}}})
        last = max((task["flow_run_run_count"] for task in found), default=0)
        return {task["name"]: task["state"]["name"] for task in found if task["flow_run_run_count"] == last}

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
        for process in _living("PREFECT_HOME", str(self.state)):
            with suppress(psutil.NoSuchProcess):
                found.append(process.cmdline())
        return found

    def of_run(self, run: str = "") -> list[psutil.Process]:
        """The processes of a run, or of any run: the flow's and all that it has started."""
        ours = _living("PREFECT_HOME", str(self.state))
        wanted = {run} if run else {flow_run["id"] for flow_run in self.call("flow_runs/filter", {})}
        return [p for p in ours if _environment(p).get("PREFECT__FLOW_RUN_ID") in wanted]

    def zombies(self) -> list[int]:
        """What has ended below it and was not waited for."""
        assert self.process is not None
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
        return found


@contextmanager
def serving_store(store: Path, state: Path, password: str = "") -> Iterator[Served]:
    """Started on a store, and killed at the end where it still runs: all that it started ends with it."""
    found = Served(store, state, password)
    try:
        found.start()
        yield found
    finally:
        if found.process is not None and found.process.poll() is None:
            found.process.kill()
            found.process.wait()


def _living(name: str, value: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _environment(process).get(name) == value]


def _environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        return process.environ()
    return {}
