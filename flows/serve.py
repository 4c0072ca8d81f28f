"""`nst serve`: Prefect's server, a worker, every deployment of prefect.yaml and the automations, until Ctrl-C or SIGTERM.

These are Prefect's own programs (and `nst automations`), started in this order as services (models/launch.py) and asked
over HTTP, so nothing here loads Prefect. A server or worker that ends by itself is started again. Their state (a SQLite
database) and their logs lie in a folder of their own.
"""

import base64
import fcntl
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.experiment import DEFAULT_STORE
from flows.terminal import StoreOption, console
from models.failures import WorkerFailed
from models.launch import Service, start_service, stop_process
from models.process_tree import ENDS_WITH_PARENT, adopt_orphans, end_children
from storage.errors import UserError
from storage.objects import Store

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_STATE = "~/.local/share/nst/prefect"
HOST, POOL = "127.0.0.1", "default"  # the pool that prefect.yaml names
START_S = 180.0  # a machine that has just installed everything reads it from disk first
CANCEL_S = 45.0  # a run has 30 s from Prefect to write its checkpoint
POLL_S = 0.3
BUSY_S = 10.0  # SQLite under a burst of requests
LOG_LINES = 30
MOST_RESTARTS, RESTARTS_WITHIN_S = 5, 600.0  # of server and worker together; then something is wrong for good
DEPLOYMENTS_PAGE = "v2/deployments?limit=50"  # all of them; the page begins with ten, without the whole experiment's
SERVER_PASSWORD, CLIENT_PASSWORD = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"
AT_WORK = ("PENDING", "RUNNING", "CANCELLING")


def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help=f"Port of {HOST}.")] = 4200,
    store: StoreOption = DEFAULT_STORE,
    state: Annotated[str, typer.Option(envvar="NST_STATE", help="Folder of Prefect's database and of the logs.")] = (
        DEFAULT_STATE
    ),
    runs: Annotated[int, typer.Option(min=1, help="So many runs at once; others wait for their turn.")] = 1,
) -> None:
    """Run Prefect's server, a worker and all deployments on this machine, ready to click; Ctrl-C stops all of it.

    Example: nst serve --store s3://team/nst
    """
    opened, folder = Store(store), Path(state).expanduser().absolute()
    opened.check_writable()
    folder.mkdir(parents=True, exist_ok=True)
    with _sole_user(folder):
        _check_port(port)
        adopt_orphans()
        local = LocalPrefect(port, folder, opened.url, runs, Asked())
        try:
            local.start()
            console.print(f"Prefect's UI:  {local.url}/{DEPLOYMENTS_PAGE}", highlight=False, soft_wrap=True)
            console.print(f"store:         {opened.url}", highlight=False, soft_wrap=True)
            console.print(f"state, logs:   {folder}", highlight=False, soft_wrap=True)
            console.print("Ctrl-C stops the server, the worker and what it runs", highlight=False)
            local.watch()
        except Stopped:
            console.print("stopping; a run that is at work writes its checkpoint first", highlight=False)
        finally:
            local.stop()
    console.print("stopped; a run that was cancelled goes on where it was when it is run again", highlight=False)


class Stopped(Exception):
    """Somebody asked us to stop."""


class Asked:
    """Takes note of SIGINT (which a shell script's `&` has ignored) and SIGTERM; a second one raises KeyboardInterrupt.

    The first raises nothing: what a handler raises is lost where Python ignores exceptions, such as in its hooks at a fork.
    """

    def __init__(self) -> None:
        self.times = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.times += 1
        if self.times > 1:
            raise KeyboardInterrupt


class LocalPrefect:
    """Server and worker as services of this process. `stop` after `start`, whether that succeeded or not."""

    def __init__(self, port: int, folder: Path, store: str, runs: int, asked: Asked) -> None:
        for log in folder.glob("*.log"):
            log.unlink()
        self.url = f"http://{HOST}:{port}"
        self._port, self._folder, self._runs, self._asked = str(port), folder, runs, asked
        self._environment = _environment(self.url, folder, store)
        self._services: dict[str, Service] = {}
        self._restarts: list[float] = []
        self._paused = folder / "paused-by-stop"  # the work pool, for as long as its last runs are being stopped

    def start(self) -> None:
        """Start the server, then the worker, then deploy. Raises Stopped, or WorkerFailed with the log of what failed.

        The automations first: one that is written anew forgets the crashes that it was to act on.
        """
        self._start_server()
        self._do("automations", "flows.cli", "automations")
        self._start_worker("nst serve was killed")
        self._do("deploy", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(ROOT / "prefect.yaml"))

    def watch(self) -> None:
        """Return never: raises Stopped when asked to, WorkerFailed where server or worker end again and again."""
        while True:
            self._check_asked()
            for name, restart in (("server", self._start_server), ("worker", self._restart_worker)):
                if self._services[name].poll() is not None:
                    self._count_restart(name)
                    restart()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Cancel what runs, then stop worker and server; no process is left. A second Ctrl-C kills them all."""
        try:
            if all(service.poll() is None for service in self._services.values()) and "worker" in self._services:
                with suppress(OSError):  # the server does not answer: then without its help
                    self._cancel_runs()
            for name in ("automations", "deploy", "worker", "server"):
                if name in self._services:
                    stop_process(self._services[name])
        finally:
            end_children()

    def _cancel_runs(self) -> None:
        """Ask the runs of our pool to stop, as the button in the UI does, and wait until they have."""
        self._paused.touch()
        self._call("PATCH", f"work_pools/{POOL}", {"is_paused": True})  # else the worker takes up those that wait
        asked: set[str] = set()
        calm, deadline = 0, time.monotonic() + CANCEL_S
        while calm < 3 and time.monotonic() < deadline:
            at_work = self._runs_at_work()
            calm = 0 if at_work else calm + 1
            for run in at_work:
                if run not in asked:
                    self._set_state(run, "CANCELLING", "nst serve is being stopped")
                    asked.add(run)
            time.sleep(POLL_S)
        stop_process(self._services["worker"])
        self._resume_pool()

    def _start_server(self) -> None:
        self._start("server", "prefect", "server", "start", "--host", HOST, "--port", self._port)
        self._wait_for("server", lambda: self._call("GET", "health") is True)

    def _start_worker(self, why: str) -> None:
        """Start it where nothing is at work: what the server thinks is was left by one that was killed, and has crashed."""
        for run in self._runs_at_work():
            self._set_state(run, "CRASHED", f"{why}; run again, it goes on where it was")
        self._resume_pool()
        self._start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process")
        self._wait_for("worker", lambda: bool(self._call("GET", f"work_pools/{POOL}")))
        # the pool's limit: a worker that has one itself (--limit) dies of a run that crashed and is scheduled again at once
        self._call("PATCH", f"work_pools/{POOL}", {"concurrency_limit": self._runs})

    def _restart_worker(self) -> None:
        """In place of one that has died; the runs that it had started would go on with nobody to cancel them."""
        end_children(spare=[service.pid for service in self._services.values()])
        self._start_worker("Prefect's worker was killed")

    def _count_restart(self, name: str) -> None:
        """Say that a service has to be started again. Raises WorkerFailed where that happens too often."""
        now, how = time.monotonic(), f"Prefect's {name} ended with code {self._services[name].returncode}"
        self._restarts = [*(when for when in self._restarts if now - when < RESTARTS_WITHIN_S), now]
        if len(self._restarts) > MOST_RESTARTS:
            raise WorkerFailed(f"{how}, time {len(self._restarts)} in ten minutes:\n{self._log(name)}")
        console.print(
            f"{how} and is started again; its log: {self._folder / name}.log", highlight=False, soft_wrap=True
        )

    def _do(self, name: str, *line: str) -> None:
        """Run a program to its end. Raises WorkerFailed with its log where it fails."""
        self._start(name, *line)
        doing = self._services[name]
        self._wait_for(name, lambda: doing.poll() is not None)
        del self._services[name]
        if doing.returncode != 0:
            raise WorkerFailed(f"{name} failed:\n{self._log(name)}")

    def _resume_pool(self) -> None:
        """Let the pool's runs be taken up again, where it was us who paused it."""
        if self._paused.exists():
            self._call("PATCH", f"work_pools/{POOL}", {"is_paused": False})
            self._paused.unlink()

    def _runs_at_work(self) -> list[str]:
        wanted = {
            "flow_runs": {"state": {"type": {"any_": AT_WORK}}},
            "work_pools": {"name": {"any_": [POOL]}},
        }
        return [run["id"] for run in self._call("POST", "flow_runs/filter", wanted)]

    def _set_state(self, run: str, kind: str, message: str) -> None:
        state = {"type": kind, "name": kind.capitalize(), "message": message}
        self._call("POST", f"flow_runs/{run}/set_state", {"state": state, "force": kind == "CRASHED"})

    def _start(self, name: str, module: str, *arguments: str) -> None:
        line = [sys.executable, "-m", module, *arguments]
        self._services[name] = start_service(line, self._environment, ROOT, self._folder / f"{name}.log")

    def _wait_for(self, name: str, ready: Callable[[], bool]) -> None:
        deadline, service = time.monotonic() + START_S, self._services[name]
        while True:
            ended = service.poll() is not None
            with suppress(OSError):  # it does not listen yet, or does not know the pool
                if ready():
                    return
            self._check_asked()
            if ended:
                raise WorkerFailed(f"Prefect's {name} ended with code {service.returncode}:\n{self._log(name)}")
            if time.monotonic() > deadline:
                raise WorkerFailed(f"Prefect's {name} did not come up in {START_S:.0f} s:\n{self._log(name)}")
            time.sleep(POLL_S)

    def _check_asked(self) -> None:
        if self._asked.times:
            raise Stopped

    def _log(self, name: str) -> str:
        path = self._folder / f"{name}.log"
        return "\n".join([*path.read_text(errors="replace").splitlines()[-LOG_LINES:], f"(all of it: {path})"])

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request to the server's API; the answer, None where it is empty. Raises OSError.

        A database that is busy, for which the server answers 503, is asked again for `BUSY_S`.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if password := self._environment.get(SERVER_PASSWORD):
            headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
        request = urllib.request.Request(f"{self.url}/api/{path}", data, headers, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                with direct.open(request, timeout=10) as answer:
                    content = answer.read()
                return json.loads(content) if content else None
            except urllib.error.HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)


def _environment(url: str, folder: Path, store: str) -> dict[str, str]:
    """What the server, the worker and, through it, the runs find: the user's environment and where things are."""
    inherited = {name: value for name, value in os.environ.items() if name != "PREFECT_PROFILE"}
    direct = ",".join(filter(None, [inherited.get("NO_PROXY") or inherited.get("no_proxy"), HOST]))
    password = {CLIENT_PASSWORD: inherited[SERVER_PASSWORD]} if inherited.get(SERVER_PASSWORD) else {}
    return {
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # 10 by default: long for somebody who has just clicked
        **inherited,
        **password,
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_UI_URL": f"{url}/v2",  # what runs say of themselves leads to the same UI as our pages' links
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "flows.event_order",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": direct,
        "no_proxy": direct,
        "NST_ROOT": str(ROOT),
        "NST_STORE": store,
        ENDS_WITH_PARENT: "1",  # the worker's runs: it leaves them alone when it is killed
    }


@contextmanager
def _sole_user(folder: Path) -> Iterator[None]:
    """Hold a state folder. Raises UserError where another `nst serve` does."""
    with (folder / "serve.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another nst serve uses {folder}; stop that one, or give this one a folder of its own with --state"
            ) from None
        yield


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} of {HOST} is taken ({error.strerror}); choose another with --port") from None
